-- Ends what waits for a person, with a new token and owner, so that a late holder's finish misses.
-- Answers done, missing, held, moved or ended.
-- ARGV: new owner, the fencing token that was seen, or nothing, state (released, completed or failed), then the fields of the outcome
if not exists then
  return answer('missing')
end
if record.owner == ARGV[1] then
  return answer('done') -- done before, and the answer did not arrive
end
if is_held() then
  return answer('held')
end
if ARGV[2] ~= '' and record.fencing_token ~= ARGV[2] then
  return answer('moved')
end
if record.state ~= 'in_doubt' and record.state ~= 'parked' and record.state ~= 'running' then
  return answer('ended')
end
local state = ARGV[3]
local was_state, was_token = record.state, record.fencing_token
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
  given(changes, {'outcome', 'codec', 'not_kept', 'error_type', 'error_message'}, 4)
end
change(changes, ends)
record.was_state, record.was_token = was_state, was_token
return answer('done')
