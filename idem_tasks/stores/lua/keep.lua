-- Keeps a pending outcome over our own running or pending marker or over none, and over nobody else's.
-- ARGV: how our own running and pending ones begin, value, milliseconds
local standing = redis.call('GET', KEYS[1])
if standing and string.sub(standing, 1, #ARGV[1]) ~= ARGV[1] and string.sub(standing, 1, #ARGV[2]) ~= ARGV[2] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
return 1
