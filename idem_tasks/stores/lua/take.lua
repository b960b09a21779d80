-- Does what SET key value NX GET PX does, for servers before 7.0: sets it if there is none, returns what stood there.
-- ARGV: value, milliseconds
local standing = redis.call('GET', KEYS[1])
if not standing then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
return standing
