-- Ends the doubt about a dead claim by an outcome or by granting the record: finished, taken_over or lost.
-- ARGV: as in grant.lua, the dead claim's fencing token and owner, running, completed or failed, then the fields of
--       the new claim or of the outcome
local state = ARGV[8]
if not exists then
  return answer('lost')
end
if record.owner == owner then
  -- Decided before, and the answer did not arrive.
  if record.state == 'running' then
    change({lease_expires_at = now + lease}, math.max(number('expires_at'), now + waiting))
    return answer('taken_over')
  end
  return answer((record.state == 'completed' or record.state == 'failed') and 'finished' or 'lost')
end
if record.state ~= 'in_doubt' or not obeys(ARGV[6], ARGV[7]) then
  return answer('lost')
end
if state == 'running' then
  return grant('taken_over', 9, {})
end
local ends = math.max(number('expires_at'), now + retention)
change(given({
  state = state, owner = owner, fencing_token = math.max(number('fencing_token') + 1, now),
  lease_expires_at = now, updated_at = now, completed_at = now, expires_at = ends,
  attention = state == 'failed' and 'failed',
}, {'outcome', 'codec', 'not_kept', 'error_type', 'error_message'}, 9), ends)
return answer('finished')
