-- Gives the claim up under its fence: released, in doubt or parked; or tells that it is finished, or lost.
-- ARGV: fencing token, owner, failed (0 or 1), in doubt (0 or 1), max_attempts or -1, failures at the claim,
--       how long a person may take (microseconds), then error_type and error_message if they are there
local state = record.state
if state == 'completed' or state == 'failed' then
  return answer('finished')
end
if not exists or not obeys(ARGV[1], ARGV[2]) then
  return answer('lost')
end
if state ~= 'running' and state ~= 'in_doubt' then
  return answer('released')
end
local failed, max_attempts = ARGV[3] == '1', tonumber(ARGV[5])
local failures = tonumber(ARGV[6]) -- so that a release sent twice counts once
if failed then
  failures = failures + 1
end
local changes = {failures = failures, lease_expires_at = now, updated_at = now}
local ends = number('expires_at')
if ARGV[4] == '1' then
  changes.state, changes.attention = 'in_doubt', 'in_doubt'
elseif failed and max_attempts >= 0 and failures >= max_attempts then
  changes.state, changes.attention = 'parked', 'parked'
else
  changes.state, changes.attention = 'released', false
end
if changes.attention then
  ends = math.max(ends, now + tonumber(ARGV[7]))
end
change(given(changes, {'error_type', 'error_message'}, 8), ends)
return answer('released')
