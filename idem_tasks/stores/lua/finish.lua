-- Records the outcome under the claim's fence, the first one only: recorded, finished (another's), lost or missing.
-- ARGV: fencing token, owner, completed or failed, retention in microseconds, then the fields of the outcome
if not exists then
  return answer('missing')
end
local ended = record.state == 'completed' or record.state == 'failed'
if not obeys(ARGV[1], ARGV[2]) then
  return answer(ended and 'finished' or 'lost')
end
if ended then
  return answer(record.state == ARGV[3] and 'recorded' or 'finished')
end
if record.state ~= 'running' and record.state ~= 'in_doubt' then
  return answer('lost')
end
local ends = math.max(number('expires_at'), now + tonumber(ARGV[4]))
change(given({
  state = ARGV[3], expires_at = ends, completed_at = now, updated_at = now,
  attention = ARGV[3] == 'failed' and 'failed',
}, {'outcome', 'codec', 'not_kept', 'error_type', 'error_message'}, 5), ends)
return answer('recorded', {})
