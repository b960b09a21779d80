-- Replaces the marker that our take set by the finished outcome, deletes any other of ours, and leaves another's.
-- (A blind SET would bring back what was forgotten meanwhile; so would replacing a marker that a command which was
-- on its way meanwhile has set: it is only deleted.)
-- ARGV: for each key the marker as our take set it, our owner, value, milliseconds
local published = {}
for i, key in ipairs(KEYS) do
  local first = 4 * i - 3
  local standing = redis.call('GET', key)
  published[i] = 0
  if standing and standing == ARGV[first] then
    redis.call('SET', key, ARGV[first + 2], 'PX', ARGV[first + 3])
    published[i] = 1
  elseif standing then
    local running, pending = 'running:' .. ARGV[first + 1] .. ':', 'pending:' .. ARGV[first + 1] .. ':'
    if string.sub(standing, 1, #running) == running or string.sub(standing, 1, #pending) == pending then
      redis.call('DEL', key)
    end
  end
end
return published
