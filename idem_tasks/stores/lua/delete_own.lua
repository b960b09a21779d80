-- Deletes each marker that begins as its own, so that nobody else's is ever deleted.
-- ARGV: for each key the beginning
local deleted = {}
for i, key in ipairs(KEYS) do
  local standing = redis.call('GET', key)
  deleted[i] = 0
  if standing and string.sub(standing, 1, #ARGV[i]) == ARGV[i] then
    deleted[i] = redis.call('DEL', key)
  end
end
return deleted
