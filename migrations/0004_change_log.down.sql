-- Takes the change log away. Tables that are tracked by way of it are tracked by NOTIFY from now on. Nodes that still run read
-- Postgres directly.
--
-- Locks: for a moment, each table that is tracked by way of the log, against writers.

do $$
declare
  call text;
begin
  if pg_catalog.to_regclass('rowcache.tracked_table') is null then
    return;
  end if;
  for call in
    select pg_catalog.replace(rowcache.track_call(t), ', via => ''log''', '')
    from rowcache.tracked_table t
    join pg_catalog.pg_class c on c.oid = t.relation
    where t.via = 'log'
  loop
    execute call;
  end loop;
end
$$;

drop view if exists rowcache.standby_stamp;
drop function if exists rowcache.trim_log(xid8);
drop function if exists rowcache.empty_log_bin(int);
drop function if exists rowcache.move_log_horizon(bigint);
drop function if exists rowcache.poll(xid8, xid8[], xid8[]);
drop function if exists rowcache.standby_canary();
drop function if exists rowcache.log_change(text);
drop sequence if exists rowcache.log_horizon;
drop view if exists rowcache.change_log;
drop table if exists rowcache.change_log_0, rowcache.change_log_1, rowcache.change_log_2;

create or replace function rowcache.schema_version() returns int
  language sql immutable
  set search_path = pg_catalog, pg_temp
as $$
  select 1
$$;
