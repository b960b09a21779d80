-- Returns the record's state.
return redis.call('HGET', KEYS[1], 'state')
