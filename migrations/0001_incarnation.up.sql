-- The schema, and what tells one run of the database from the next.
--
-- After a crash, a failover or a restore Postgres hands out transaction ids again, so nothing read before it may be
-- compared with anything read after it. The row of an unlogged table disappears in exactly these cases and survives a
-- clean restart: a new row is a new incarnation.
--
-- Locks: none on tables of yours. May be run again.

create schema if not exists rowcache;
comment on schema rowcache is 'rowcache: rows cached inside services, kept coherent by triggers and NOTIFY';
grant usage on schema rowcache to public;

create unlogged table if not exists rowcache.canary (id uuid not null);
comment on table rowcache.canary is 'At most one row; lost in a crash, on a promoted standby and on a restored base backup';
-- An index on a constant: a second row is a conflict, so that many first callers agree on one row.
create unique index if not exists canary_only_one on rowcache.canary ((true));

create or replace function rowcache.incarnation() returns text
  language plpgsql volatile security definer
  set search_path = pg_catalog, pg_temp
as $$
declare
  canary uuid;
begin
  select c.id into canary from rowcache.canary c;
  if canary is null then
    -- Waits for a caller that is inserting at the same moment; the next statement then sees that caller's row.
    insert into rowcache.canary (id) values (gen_random_uuid()) on conflict do nothing;
    select c.id into strict canary from rowcache.canary c;
  end if;
  return (select s.system_identifier::text from pg_control_system() s) || '/' || canary::text;
end
$$;
comment on function rowcache.incarnation() is
  'system identifier/canary: changes after a crash, a failover or a restore. Puts the canary in place if it is missing';

create or replace view rowcache.stamp as
select
  (select c.id from rowcache.canary c) as canary,
  (extract(epoch from pg_catalog.pg_postmaster_start_time()) * 1000000)::bigint as started,
  -- Has written what may yet be rolled back; or was begun by hand with an isolation of its own, so that its snapshot may be
  -- from long before this statement. (Where sessions default to another isolation, each statement begins by itself.)
  pg_catalog.pg_current_xact_id_if_assigned() is not null
    or pg_catalog.current_setting('transaction_isolation') <> 'read committed'
      and pg_catalog.current_setting('transaction_isolation') <> pg_catalog.current_setting('default_transaction_isolation')
    as dirty,
  -- Read after the snapshot was taken: whatever the snapshot shows was logged before this position.
  (pg_catalog.pg_current_wal_insert_lsn() - '0/0'::pg_catalog.pg_lsn)::bigint as lsn;
comment on view rowcache.stamp is
  'One row, read with every load. canary: null if lost. started: of the server, microseconds since 1970. dirty: this transaction has written, or may have an old snapshot. lsn: everything seen was logged before it';
grant select on rowcache.stamp to public;

create or replace function rowcache.token() returns text
  language sql volatile
  set search_path = pg_catalog, pg_temp
as $$
  select '1.'
    || to_hex(
      ('x' || left(h.digits, 16))::bit(64)::bigint # ('x' || right(h.digits, 16))::bit(64)::bigint # s.started
    )
    || '.' || coalesce(pg_current_xact_id_if_assigned()::text, '0')
  from rowcache.stamp s
  cross join lateral (select replace(s.canary::text, '-', '')) as h(digits)
$$;
comment on function rowcache.token() is
  'Names this transaction, for reads elsewhere that must see it: hand it out once COMMIT has succeeded. Null if the canary is lost';
