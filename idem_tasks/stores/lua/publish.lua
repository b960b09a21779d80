-- Replaces our own running or pending marker by the finished outcome; leaves anything else, or nothing.
-- (A blind SET would bring back what was forgotten meanwhile.)
-- ARGV: how our own running and pending ones begin, value, milliseconds
local standing = redis.call('GET', KEYS[1])
if standing and (string.sub(standing, 1, #ARGV[1]) == ARGV[1] or string.sub(standing, 1, #ARGV[2]) == ARGV[2]) then
  redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
  return 1
end
return 0
