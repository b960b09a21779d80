-- Deletes the record unless its holder's lease lives: held, or how many were deleted.
if exists and is_held() then
  return answer('held')
end
redis.call('DEL', KEYS[1])
return answer(exists and 'deleted' or 'missing')
