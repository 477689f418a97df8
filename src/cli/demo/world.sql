-- The world of the demo: a table, and a history that says what happened to it in which order.

create schema rowcache_demo;
comment on schema rowcache_demo is 'Made by `rowcache demo`; may be dropped when none is running';

-- How many rows there were at first, and whether the last demo to leave lets the schema be.
create table rowcache_demo.world (row_count bigint not null, keep boolean not null);

create table rowcache_demo.users (
  id bigint primary key,
  name text not null,
  plan text not null default 'free',
  logins int not null default 0,
  -- Another one with every write, whoever writes, and whatever they say.
  version bigint not null default 0
);

create sequence rowcache_demo.steps;

-- One row per changed row, written by the transaction that changed it. A lost one is only a check less: unlogged.
create unlogged table rowcache_demo.history (
  -- Null: every row, by a TRUNCATE.
  id bigint,
  -- Null: the row is gone.
  version bigint,
  xid xid8 not null default pg_current_xact_id(),
  -- In the order of commits for each id, because it is taken while the row is locked. Versions are not: an INSERT gets
  -- its version before it waits for the transaction that deletes the same id.
  step bigint not null default nextval('rowcache_demo.steps'),
  at timestamptz not null default now()
);
create index history_id on rowcache_demo.history (id, xid);
create index history_at on rowcache_demo.history using brin (at);

create function rowcache_demo.set_version() returns trigger language plpgsql as $$
begin
  new.version := nextval('rowcache_demo.steps');
  return new;
end
$$;

create function rowcache_demo.record_written() returns trigger language plpgsql as $$
begin
  insert into rowcache_demo.history (id, version) select n.id, n.version from new_rows n;
  return null;
end
$$;

create function rowcache_demo.record_deleted() returns trigger language plpgsql as $$
begin
  insert into rowcache_demo.history (id) select o.id from old_rows o;
  return null;
end
$$;

-- Per row: one statement can hand an id on from row to row, and joining transition tables has no plan that is good for
-- one row and for all of them.
create function rowcache_demo.record_moved() returns trigger language plpgsql as $$
begin
  insert into rowcache_demo.history (id)
  select old.id where not exists (select from rowcache_demo.users u where u.id = old.id);
  return null;
end
$$;

create function rowcache_demo.record_truncated() returns trigger language plpgsql as $$
begin
  insert into rowcache_demo.history (id) values (null);
  return null;
end
$$;

insert into rowcache_demo.users (id, name) select n, 'user ' || n from generate_series(1, $ROWS) n;

create trigger set_version before insert or update on rowcache_demo.users
  for each row execute function rowcache_demo.set_version();
create trigger record_inserted after insert on rowcache_demo.users
  referencing new table as new_rows for each statement execute function rowcache_demo.record_written();
create trigger record_updated after update on rowcache_demo.users
  referencing new table as new_rows for each statement execute function rowcache_demo.record_written();
create trigger record_moved after update on rowcache_demo.users
  for each row when (old.id is distinct from new.id) execute function rowcache_demo.record_moved();
create trigger record_deleted after delete on rowcache_demo.users
  referencing old table as old_rows for each statement execute function rowcache_demo.record_deleted();
create trigger record_truncated after truncate on rowcache_demo.users
  for each statement execute function rowcache_demo.record_truncated();
