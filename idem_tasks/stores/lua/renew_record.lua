-- Extends the lease if the record still runs under this fence; the key's own time to live is far longer.
-- ARGV: fencing token, owner, lease in microseconds
local seen = redis.call('HMGET', KEYS[1], 'state', 'fencing_token', 'owner')
if seen[1] ~= 'running' or seen[2] ~= ARGV[1] or seen[3] ~= ARGV[2] then
  return 0
end
if redis.replicate_commands then
  redis.replicate_commands()
end
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
redis.call('HSET', KEYS[1],
  'lease_expires_at', string.format('%.0f', now + tonumber(ARGV[3])), 'updated_at', string.format('%.0f', now))
return 1
