-- Claims the record in one step, or tells why not: granted, again, taken_over, finished, running, in_doubt, parked.
-- ARGV: owner, lease, max_hold, retention, how long a person may take (microseconds), hold or rerun,
--       max_crashes or -1, then those of fingerprint, holder and traceparent that are there
local on_crash, max_crashes = ARGV[6], tonumber(ARGV[7])

-- Always the first: what has expired is mostly gone already, and counts no generations.
local function begin_generation()
  return grant('granted', 8, {
    generation = 1, attempts = 0, failures = 0, crashes = 0, created_at = now,
    outcome = false, codec = false, not_kept = false, error_type = false, error_message = false, completed_at = false,
  })
end

local function take_over()
  local crashes = number('crashes') + 1
  local ends = math.max(number('expires_at'), now + waiting)
  if max_crashes >= 0 and crashes > max_crashes then
    change({state = 'parked', crashes = crashes, attention = 'parked', updated_at = now}, ends)
    return answer('newly_parked')
  end
  if on_crash == 'hold' then
    -- The dead claim's token and owner stay: a late finish of that claim still tells the truth.
    change({state = 'in_doubt', crashes = crashes, attention = 'in_doubt', updated_at = now}, ends)
    return answer('newly_in_doubt')
  end
  return grant('taken_over', 8, {crashes = crashes})
end

local state = record.state
if not exists then
  return begin_generation()
end
if state == 'completed' or state == 'failed' or state == 'released' then
  if number('expires_at') <= now then
    return begin_generation()
  elseif state == 'released' then
    return grant('granted', 8, {})
  end
  return answer('finished')
end
if state ~= 'running' then
  return answer(state or 'unreadable')
end
if record.owner == owner then
  -- Granted before, and the answer did not arrive. Whether it took over is not known any more: rather say so once
  -- too often.
  change({lease_expires_at = now + lease}, math.max(number('expires_at'), now + waiting))
  return answer(number('crashes') > 0 and 'taken_over' or 'granted')
end
if is_held() then
  return answer('running')
end
return take_over()
