-- Replaces the marker that our take set by the finished outcome, deletes any other of ours, and leaves another's.
-- (A blind SET would bring back what was forgotten meanwhile; so would replacing a marker that a command which was
-- on its way meanwhile has set: it is only deleted.)
-- ARGV: for each key the marker as our take set it, how our own running and pending ones begin, value, milliseconds
local published = {}
for i, key in ipairs(KEYS) do
  local first = 5 * i - 4
  local standing = redis.call('GET', key)
  published[i] = 0
  if standing and standing == ARGV[first] then
    redis.call('SET', key, ARGV[first + 3], 'PX', ARGV[first + 4])
    published[i] = 1
  elseif standing then
    local running, pending = ARGV[first + 1], ARGV[first + 2]
    if string.sub(standing, 1, #running) == running or string.sub(standing, 1, #pending) == pending then
      redis.call('DEL', key)
    end
  end
end
return published
