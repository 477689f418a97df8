-- Removes everything of rowcache, also where the later files were not taken back first: the triggers from all tracked
-- tables, then every object by name.
--
-- Locks: access exclusive, for a moment, each tracked table.
--
-- The table rowcache.migrations belongs to whoever runs these files and is left alone; without it the schema goes as well.

do $$
declare
  object record;
begin
  for object in
    select t.tgname, t.tgrelid::regclass as relation
    from pg_catalog.pg_trigger t
    join pg_catalog.pg_proc p on p.oid = t.tgfoid
    join pg_catalog.pg_namespace n on n.oid = p.pronamespace
    where n.nspname = 'rowcache' and t.tgname like 'zz\_rowcache\_%' and t.tgparentid = 0
  loop
    execute pg_catalog.format('drop trigger %I on %s', object.tgname, object.relation);
  end loop;

  for object in
    select p.oid::regprocedure as function
    from pg_catalog.pg_proc p
    join pg_catalog.pg_namespace n on n.oid = p.pronamespace
    where n.nspname = 'rowcache' and p.proname like 'changed\_%'
  loop
    execute pg_catalog.format('drop function %s', object.function);
  end loop;

  for object in
    select c.oid::regclass as relation
    from pg_catalog.pg_class c
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where n.nspname = 'rowcache' and c.relkind = 'r' and c.relname like 'shared\_%'
  loop
    execute pg_catalog.format('drop table %s', object.relation);
  end loop;
end
$$;

drop function if exists rowcache.unshare(text);
drop function if exists rowcache.share(text, text[], boolean);

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
drop function if exists rowcache.schema_version();
drop function if exists rowcache.describe(text);
drop function if exists rowcache.described(regclass, text);
drop function if exists rowcache.fingerprints(text[]);
drop function if exists rowcache.enums(regclass);
drop view if exists rowcache.tracked;
drop function if exists rowcache.untrack(regclass);
drop function if exists rowcache.track(regclass, name[], name[], name[], int, text, boolean, text);
drop function if exists rowcache.problems(regclass);
do $$
begin
  -- This function's argument type goes with the table.
  if pg_catalog.to_regclass('rowcache.tracked_table') is not null then
    drop function if exists rowcache.trigger_source(rowcache.tracked_table);
    drop function if exists rowcache.track_call(rowcache.tracked_table);
  end if;
end
$$;
drop table if exists rowcache.tracked_table;
drop function if exists rowcache.key_secret();
drop table if exists rowcache.secret;
drop function if exists rowcache.hmac_pad(bytea, int);
drop function if exists rowcache.log_insert();
drop function if exists rowcache.expected_triggers(regclass, text, boolean);
drop function if exists rowcache.key_text(regclass, name, text);
drop function if exists rowcache.needs_row_level(regclass);
drop function if exists rowcache.tree(regclass);
drop function if exists rowcache.primary_key(regclass);
drop function if exists rowcache.base_type(oid);
drop function if exists rowcache.relation_name(regclass);

drop function if exists rowcache.token();
drop view if exists rowcache.stamp;
drop function if exists rowcache.incarnation();
drop table if exists rowcache.canary;

do $$
begin
  if exists (select from pg_catalog.pg_namespace where nspname = 'rowcache')
    and pg_catalog.to_regclass('rowcache.migrations') is null
  then
    drop schema rowcache;
  end if;
end
$$;
