-- Deletes the marker if it begins like this, so that nobody else's is ever deleted.
-- ARGV: beginning
local standing = redis.call('GET', KEYS[1])
if standing and string.sub(standing, 1, #ARGV[1]) == ARGV[1] then
  return redis.call('DEL', KEYS[1])
end
return 0
