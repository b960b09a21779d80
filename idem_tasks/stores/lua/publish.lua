-- Replaces the marker that our take set by the finished outcome, deletes any other of ours, and leaves another's.
-- (A blind SET would bring back what was forgotten meanwhile; so would replacing a marker that a command which was
-- on its way meanwhile has set: it is only deleted.)
-- ARGV: for each key the marker as our take set it, value, milliseconds. The first ends with its owner and a colon if
--       nobody heard that it was taken: then there is none to replace.
local published = {}
for i, key in ipairs(KEYS) do
  local taken = ARGV[3 * i - 2]
  local standing = redis.call('GET', key)
  published[i] = 0
  if standing and standing == taken and string.sub(taken, -1) ~= ':' then
    redis.call('SET', key, ARGV[3 * i - 1], 'PX', ARGV[3 * i])
    published[i] = 1
  elseif standing then
    local owner = string.match(taken, '^running(:[^:]*:)')
    local kind = string.sub(standing, 1, 7)
    if (kind == 'running' or kind == 'pending') and string.sub(standing, 8, 7 + #owner) == owner then
      redis.call('DEL', key)
    end
  end
end
return published
