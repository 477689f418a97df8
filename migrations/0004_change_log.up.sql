-- The change log: the second way in which triggers tell nodes what changed. A commit that notifies holds one lock of the
-- whole server until it is flushed; a row that is inserted holds none.
--
-- A message is a row, written by the transaction that it tells of. Nodes read the log from snapshot to snapshot: what has
-- become visible since the last time (poll). The order of numbers is not the order of commits, and time is neither.
--
-- The log has three bins. A transaction writes to the bin that its id names: 524288 ids to the first one, as many to the
-- next, and round again. So while the third bin is written to, the first can be emptied with TRUNCATE, which costs nothing per
-- row and leaves nothing to be vacuumed (trim_log).
--
-- Locks: none on tables of yours. May be run again.

do $$
begin
  for bin in 0..2 loop
    execute format($f$
      create table if not exists rowcache.change_log_%1$s (
        -- Of the whole transaction, also within a savepoint.
        xid xid8 not null default pg_catalog.pg_current_xact_id(),
        message text not null
      ) with (autovacuum_enabled = off, toast.autovacuum_enabled = off);
      create index if not exists change_log_%1$s_xid on rowcache.change_log_%1$s (xid);
      comment on table rowcache.change_log_%1$s is 'A bin of the change log. Leave its rows out of dumps';
      grant select, insert (message) on rowcache.change_log_%1$s to public;
    $f$, bin);
  end loop;
end
$$;

create or replace view rowcache.change_log as
select l.xid, l.message from rowcache.change_log_0 l
union all
select l.xid, l.message from rowcache.change_log_1 l
union all
select l.xid, l.message from rowcache.change_log_2 l;
comment on view rowcache.change_log is 'What triggers of tables that were tracked with via => ''log'' have told';
grant select on rowcache.change_log to public;

-- A sequence, for what is put into it is seen at once, whatever snapshot one looks with.
create sequence if not exists rowcache.log_horizon as bigint minvalue 0 start 0;
comment on sequence rowcache.log_horizon is 'Messages of transactions below this id may have been removed';
grant select on rowcache.log_horizon to public;

create or replace function rowcache.log_change(message text) returns void
  language plpgsql volatile
  set search_path = pg_catalog, pg_temp
as $$
begin
    case (pg_current_xact_id()::text::bigint >> 19) % 3
      when 0 then insert into rowcache.change_log_0 (message) values (log_change.message);
      when 1 then insert into rowcache.change_log_1 (message) values (log_change.message);
      else insert into rowcache.change_log_2 (message) values (log_change.message);
    end case;
end
$$;
comment on function rowcache.log_change(text) is 'Puts a message into the change log, when and if this transaction commits';

create or replace function rowcache.poll(since xid8, pending xid8[], skip xid8[])
  returns table (canary uuid, started bigint, standby boolean, snapshot text, lsn bigint, horizon bigint, xid bigint, message text)
  -- Volatile: each statement in here has a snapshot of its own, later than that of the one before.
  language plpgsql volatile
  set search_path = pg_catalog, pg_temp
  -- To plan the search in a bin takes longer than the search. But a bin grows under a plan that was made while it was empty, so
  -- that plan must not be to read all of it; and what that says of costs is not to be compiled for.
  set plan_cache_mode = force_generic_plan
  set enable_seqscan = off
  set jit = off
as $$
declare
  seen pg_snapshot;
  ended xid8;
  last_range bigint;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'the change log is polled with isolation %, not read committed', current_setting('transaction_isolation')
      using errcode = 'object_not_in_prerequisite_state',
        hint = format('Run: alter role %I set default_transaction_isolation = ''read committed''', current_user);
  end if;

  -- First what must be older than the snapshot: how far the log had been trimmed, and how far the database was.
  standby := pg_is_in_recovery();
  if standby then
    lsn := pg_last_wal_replay_lsn() - '0/0'::pg_lsn;
    canary := rowcache.standby_canary();
    select q.last_value into horizon from rowcache.log_horizon q;
  else
    lsn := pg_current_wal_insert_lsn() - '0/0'::pg_lsn;
    select q.last_value, s.canary into horizon, canary from rowcache.log_horizon q cross join rowcache.stamp s;
  end if;
  started := extract(epoch from pg_postmaster_start_time()) * 1000000;
  seen := pg_current_snapshot();
  snapshot := seen::text;
  return next;

  -- What was not seen the last time: transactions that began to be visible since, and those that were running then. On a
  -- standby nobody knows which ones were running, only the oldest; those that were read are left out.
  ended := pg_snapshot_xmax(seen);
  if since is not null then
    last_range := ended::text::bigint >> 19;
    -- The first one of `pending` is the oldest. There are no more than three bins: who comes later than that is told by the horizon.
    for range in greatest(least(since, pending[1])::text::bigint >> 19, last_range - 2)..last_range loop
      case range % 3
        when 0 then
          return query
            select null::uuid, null::bigint, null::boolean, null::text, null::bigint, null::bigint, l.xid::text::bigint, l.message
            from rowcache.change_log_0 l where l.xid >= since and l.xid < ended and l.xid <> all (skip)
            union all
            select null, null, null, null, null, null, l.xid::text::bigint, l.message
            from rowcache.change_log_0 l where l.xid = any (pending);
        when 1 then
          return query
            select null::uuid, null::bigint, null::boolean, null::text, null::bigint, null::bigint, l.xid::text::bigint, l.message
            from rowcache.change_log_1 l where l.xid >= since and l.xid < ended and l.xid <> all (skip)
            union all
            select null, null, null, null, null, null, l.xid::text::bigint, l.message
            from rowcache.change_log_1 l where l.xid = any (pending);
        else
          return query
            select null::uuid, null::bigint, null::boolean, null::text, null::bigint, null::bigint, l.xid::text::bigint, l.message
            from rowcache.change_log_2 l where l.xid >= since and l.xid < ended and l.xid <> all (skip)
            union all
            select null, null, null, null, null, null, l.xid::text::bigint, l.message
            from rowcache.change_log_2 l where l.xid = any (pending);
      end case;
    end loop;
  end if;

  -- Last, what must be younger: whatever was removed before it could be read.
  return query
    select null::uuid, null::bigint, null::boolean, null::text, null::bigint, q.last_value, null::bigint, null::text
    from rowcache.log_horizon q;
end
$$;
comment on function rowcache.poll(xid8, xid8[], xid8[]) is
  'What has become visible in the change log: transactions from `since` on, without `skip`, and those of `pending`. First row: the snapshot up to which this is; last row: below which id messages may be missing';

create or replace function rowcache.move_log_horizon(at_least bigint) returns bigint
  language sql volatile
  set search_path = pg_catalog, pg_temp
as $$
  -- One beyond what there has been comes from the dump of another server.
  select setval('rowcache.log_horizon', greatest(at_least, case
    when q.last_value <= pg_snapshot_xmax(pg_current_snapshot())::text::bigint then q.last_value + 1
    else 0
  end))
  from rowcache.log_horizon q
$$;
comment on function rowcache.move_log_horizon(bigint) is
  'Whoever misses messages knows it by a horizon that has moved: upwards, whenever some are removed, before they are, and when their transactions have ended';

create or replace function rowcache.empty_log_bin(bin int) returns boolean
  -- Definer, because TRUNCATE is the owner's.
  language plpgsql volatile security definer
  set search_path = pg_catalog, pg_temp
as $$
declare
  range bigint;
begin
  execute format('lock table rowcache.change_log_%s in access exclusive mode nowait', bin);
  -- Looked at only now: whoever wrote to this bin and ended, ended before, and nobody writes to it any more.
  range := pg_snapshot_xmax(pg_current_snapshot())::text::bigint >> 19;
  if (range + 1) % 3 <> bin then
    return false;
  end if;
  perform rowcache.move_log_horizon(greatest(range - 1, 0) << 19);
  execute format('truncate rowcache.change_log_%s', bin);
  return true;
exception when lock_not_available then
  -- Whoever has written to the bin, or reads it, and has not ended yet.
  return false;
end
$$;
revoke execute on function rowcache.empty_log_bin(int) from public;
comment on function rowcache.empty_log_bin(int) is 'A part of trim_log. False: it is not the one that is written to next, or not free';

create or replace function rowcache.trim_log(before xid8 default null) returns boolean
  -- Definer, because DELETE is the owner's.
  language plpgsql volatile security definer
  set search_path = pg_catalog, pg_temp
as $$
declare
  seen pg_snapshot;
  next_bin int;
  rows_max int := 20000;
  removed int;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    -- Looks from before the locks would not do.
    raise exception 'the change log is trimmed with isolation %, not read committed', current_setting('transaction_isolation')
      using errcode = 'object_not_in_prerequisite_state';
  end if;
  begin
    -- Whoever else trims. Nobody waits for this, and it waits for nobody.
    lock table rowcache.change_log_0 in share update exclusive mode nowait;
  exception when lock_not_available then
    return false;
  end;
  seen := pg_current_snapshot();
  next_bin := ((pg_snapshot_xmax(seen)::text::bigint >> 19) + 1) % 3;
  if pg_relation_size(format('rowcache.change_log_%s', next_bin)::regclass) > 0 and not rowcache.empty_log_bin(next_bin) then
    return false;
  end if;

  if before is null then
    return true;
  end if;
  -- What still runs may yet commit messages that nobody has read: not even below a horizon that is there already.
  before := least(before, pg_snapshot_xmin(seen));
  if not exists (select from rowcache.change_log l where l.xid < before) then
    return true;
  end if;
  perform rowcache.move_log_horizon(before::text::bigint);
  for bin in 0..2 loop
    execute format('delete from rowcache.change_log_%1$s where ctid = any (array(
      select l.ctid from rowcache.change_log_%1$s l where l.xid < $1 order by l.xid limit $2))', bin)
      using before, rows_max;
    get diagnostics removed = row_count;
    if removed = rows_max then
      return false;
    end if;
  end loop;
  return true;
end
$$;
comment on function rowcache.trim_log(xid8) is
  'Empties the bin that is written to next, if that is due, and removes messages of transactions below `before`. False: somebody is in the way, or there is more; call it again. Anybody may call it';

create or replace function rowcache.standby_canary() returns uuid
  language sql stable
  set search_path = pg_catalog, pg_temp
as $$
  select md5('standby ' || s.system_identifier || ' ' || d.oid)::uuid
  from pg_control_system() s
  cross join pg_database d
  where d.datname = current_database()
$$;
comment on function rowcache.standby_canary() is
  'Stands for the canary where that cannot be read. With the time at which the server was started it names one run of one standby';

create or replace view rowcache.standby_stamp as
select
  case when pg_catalog.pg_is_in_recovery() then rowcache.standby_canary() end as canary,
  (extract(epoch from pg_catalog.pg_postmaster_start_time()) * 1000000)::bigint as started,
  pg_catalog.current_setting('transaction_isolation') <> 'read committed'
    and pg_catalog.current_setting('transaction_isolation') <> pg_catalog.current_setting('default_transaction_isolation')
    as dirty,
  (pg_catalog.pg_last_wal_replay_lsn() - '0/0'::pg_catalog.pg_lsn)::bigint as lsn;
comment on view rowcache.standby_stamp is
  'As rowcache.stamp, for reads on a standby. canary: null once it has been promoted. lsn: read after the snapshot was taken';
grant select on rowcache.standby_stamp to public;

create or replace function rowcache.schema_version() returns int
  language sql immutable
  set search_path = pg_catalog, pg_temp
as $$
  select 2
$$;
comment on function rowcache.schema_version() is 'The version of the objects in this schema; last, so that it stands for all of them';
