-- Deletes the record unless its holder's lease lives or it has moved on: deleted, missing, held or moved.
-- ARGV: the fencing token that was seen, or nothing
if not exists then
  return answer('missing')
end
if is_held() then
  return answer('held')
end
if ARGV[1] ~= '' and record.fencing_token ~= ARGV[1] then
  return answer('moved')
end
redis.call('DEL', KEYS[1])
record.was_state, record.was_token = record.state, record.fencing_token
return answer('deleted')
