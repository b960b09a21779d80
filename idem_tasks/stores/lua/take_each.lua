-- Does for each key what SET key value NX GET PX does, and also tells what is left of the time of what stood there.
-- ARGV: for each key a value and milliseconds
if redis.replicate_commands then
  redis.replicate_commands() -- 6.2 may be set up to repeat scripts on replicas, which PTTL forbids
end
local standing = {}
for i, key in ipairs(KEYS) do
  local value = redis.call('GET', key)
  if value then
    standing[i] = {value, redis.call('PTTL', key)}
  else
    redis.call('SET', key, ARGV[2 * i - 1], 'PX', ARGV[2 * i])
    standing[i] = false
  end
end
return standing
