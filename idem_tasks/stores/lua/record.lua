-- The beginning of every script that changes a record: Redis' clock, the record as it is, and how it is changed.
-- A record is a hash; times are microseconds since the epoch, and what is not there is None.
if redis.replicate_commands then
  redis.replicate_commands() -- 6.2 may be set up to repeat scripts on replicas, which the clock forbids
end
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local record = {}
local exists = false
local found = redis.call('HGETALL', KEYS[1])
for i = 1, #found, 2 do
  record[found[i]] = found[i + 1]
  exists = true
end

-- A script's numbers are floats: written out in full, they are exact up to 2^53.
local function whole(number)
  return string.format('%.0f', number)
end

local function number(field)
  return tonumber(record[field] or '0')
end

local function obeys(token, owner)
  return record.fencing_token == token and record.owner == owner
end

local function is_held()
  return record.state == 'running' and now < number('lease_expires_at')
end

-- Takes optional fields from the arguments: name, value, name, value ..; those not among them are None.
local function given(changes, names, first)
  for _, name in ipairs(names) do
    changes[name] = false
  end
  for i = first, #ARGV, 2 do
    changes[ARGV[i]] = ARGV[i + 1]
  end
  return changes
end

-- Changes fields (false takes one away) and sets the end of the whole key, in microseconds since the epoch.
local function change(changes, ends)
  local set, gone = {}, {}
  for field, value in pairs(changes) do
    if value then
      set[#set + 1] = field
      set[#set + 1] = type(value) == 'number' and whole(value) or value
      record[field] = set[#set]
    else
      gone[#gone + 1] = field
      record[field] = nil
    end
  end
  redis.call('HSET', KEYS[1], unpack(set))
  if exists and #gone > 0 then
    redis.call('HDEL', KEYS[1], unpack(gone))
  end
  redis.call('PEXPIRE', KEYS[1], whole(math.max(math.ceil((ends - now) / 1000), 1)))
end

-- What a script answers: a word, the time, and the record's fields; or only these, if they are named.
local function answer(word, names)
  local reply = {word, whole(now)}
  local told = record
  if names then
    told = {}
    for _, field in ipairs(names) do
      told[field] = record[field]
    end
  end
  for field, value in pairs(told) do
    reply[#reply + 1] = field
    reply[#reply + 1] = value
  end
  return reply
end
