-- Removes all shared values, with their tables.
--
-- Locks: none on tables of yours. May be run again.

do $$
declare
  object record;
begin
  for object in
    select c.oid::regclass as relation
    from pg_catalog.pg_class c
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where n.nspname = 'rowcache' and c.relkind = 'r' and c.relname like 'shared\_%'
  loop
    if pg_catalog.to_regprocedure('rowcache.untrack(regclass)') is not null then
      perform rowcache.untrack(object.relation);
    end if;
    execute pg_catalog.format('drop table %s', object.relation);
  end loop;
end
$$;

drop function if exists rowcache.unshare(text);
drop function if exists rowcache.share(text, text[], boolean);
