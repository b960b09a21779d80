-- Replaces the marker that our take set by the finished outcome, deletes any other of ours, and leaves another's.
-- (A blind SET would bring back what was forgotten meanwhile; so would replacing a marker that a command which was
-- on its way meanwhile has set: it is only deleted.)
-- ARGV: the marker as our take set it, how our own running and pending ones begin, value, milliseconds
local standing = redis.call('GET', KEYS[1])
if not standing then
  return 0
end
if standing == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[5])
  return 1
end
if string.sub(standing, 1, #ARGV[2]) == ARGV[2] or string.sub(standing, 1, #ARGV[3]) == ARGV[3] then
  redis.call('DEL', KEYS[1])
end
return 0
