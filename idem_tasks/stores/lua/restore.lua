-- Writes the record of a claim that was lost with a server's last moments again, and never over one that is there.
-- ARGV: max_hold + retention, how long a person may take (microseconds), then fields
if not exists then
  local ends = now + tonumber(ARGV[1])
  change(given({
    state = 'running', created_at = now, updated_at = now, lease_expires_at = now, expires_at = ends,
  }, {}, 3), math.max(ends, now + tonumber(ARGV[2])))
end
return 0
