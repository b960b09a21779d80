-- Goes before every script that may grant the record, whose ARGV begin with: owner, lease, max_hold, retention,
-- how long a person may take (microseconds).
local owner = ARGV[1]
local lease, max_hold, retention = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local waiting = tonumber(ARGV[5])

-- Those of fingerprint, holder and traceparent that are there begin at the argument `first`.
local function grant(word, first, changes)
  local ends = now + max_hold + retention
  changes.state = 'running'
  changes.fencing_token = math.max(number('fencing_token') + 1, now)
  changes.owner = owner
  changes.attempts = (changes.attempts or number('attempts')) + 1
  changes.lease_expires_at = now + lease
  changes.expires_at = ends
  changes.updated_at = now
  changes.attention = false
  given(changes, {'fingerprint', 'holder', 'traceparent'}, first)
  change(changes, math.max(ends, now + waiting))
  return answer(word, {'fencing_token', 'attempts', 'failures', 'crashes', 'generation'})
end
