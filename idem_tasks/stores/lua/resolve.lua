-- Ends what waits for a person, with a new token and owner, so that a late holder's finish misses.
-- Answers done, missing, held or ended.
-- ARGV: new owner, state (released, completed or failed), then the fields of the outcome
if not exists then
  return answer('missing')
end
if record.owner == ARGV[1] then
  return answer('done') -- done before, and the answer did not arrive
end
if is_held() then
  return answer('held')
end
if record.state ~= 'in_doubt' and record.state ~= 'parked' and record.state ~= 'running' then
  return answer('ended')
end
local state = ARGV[2]
local retention = number('expires_at') - number('created_at')
local ends = math.max(number('expires_at'), now + retention)
local changes = {
  state = state, owner = ARGV[1], fencing_token = math.max(number('fencing_token') + 1, now),
  lease_expires_at = now, updated_at = now, expires_at = ends, attention = state == 'failed' and 'failed',
}
if state == 'released' then
  changes.failures, changes.crashes = 0, 0
else
  changes.completed_at = now
  given(changes, {'outcome', 'codec', 'not_kept', 'error_type', 'error_message'}, 3)
end
change(changes, ends)
return answer('done')
