-- Extends our own running marker, puts it back if it is gone, and leaves everybody else's.
-- ARGV: how our own begins, value, milliseconds
local standing = redis.call('GET', KEYS[1])
if not standing then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
elseif string.sub(standing, 1, #ARGV[1]) == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return 0
