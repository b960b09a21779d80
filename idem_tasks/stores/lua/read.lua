-- Returns the record with Redis' time.
return {'record', redis.call('TIME'), redis.call('HGETALL', KEYS[1])}
