-- What nodes ask before they trust a table, and once a second while they do.
--
-- Locks: none on tables of yours. May be run again.

create or replace function rowcache.enums(relation regclass) returns text
  -- A function of its own: for most tables it is not called, and need not be prepared.
  language plpgsql stable
  set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    with recursive kind(oid) as (
      select a.atttypid from pg_attribute a where a.attrelid = relation and a.attnum > 0
      union
      select u.oid
      from kind k
      join pg_type y on y.oid = k.oid
      cross join lateral (
        select y.typelem
        union all select y.typbasetype
        union all select f.atttypid from pg_attribute f where f.attrelid = y.typrelid and f.attnum > 0
        union all select r.rngsubtype from pg_range r where y.oid in (r.rngtypid, r.rngmultitypid)
      ) as u(oid)
      where u.oid >= 16384
    )
    select sum(e.xmin::text::bigint)::text from kind k join pg_enum e on e.enumtypid = k.oid
  );
end
$$;
comment on function rowcache.enums(regclass) is 'Changes when a value of an enum changes that a column is made of';

create or replace function rowcache.fingerprints(names text[]) returns table (name text, fingerprint text)
  -- plpgsql, so that its plan is kept for the session: the one that fits all arguments, since to make one for these takes longer
  -- than all the rest.
  language plpgsql stable
  set search_path = pg_catalog, pg_temp
  set plan_cache_mode = force_generic_plan
  set jit = off
as $$
declare
  one text;
  shown text[] := '{}';
  found_oids oid[] := '{}';
begin
  foreach one in array array(select distinct u.name from unnest(names) as u(name)) loop
    shown := shown || one;
    begin
      found_oids := found_oids || to_regclass(one)::oid;
    exception when insufficient_privilege then
      -- In a schema that the caller may not look into any more. That is the doubt of one table, not of all.
      found_oids := found_oids || null::oid;
    end;
  end loop;
  -- The row versions of everything that decides whether a write is seen: disabling a trigger, writing and enabling it
  -- again leaves a new one. Statistics, vacuum and indexes are written in place, or elsewhere.
  return query
    with recursive tree(name, member) as (
      select n.name, n.member from unnest(shown, found_oids) as n(name, member)
      union
      select t.name, i.inhrelid from tree t join pg_inherits i on i.inhparent = t.member
    )
    select
      t.name,
      case when count(t.member) > 0 then encode(sha256(convert_to(string_agg(
        concat_ws(' ',
          t.member,
          (select concat_ws(' ', c.xmin, c.relfilenode, c.relkind) from pg_class c where c.oid = t.member),
          -- Later row versions have larger numbers, so a sum changes with any of them.
          (
            select sum(a.xmin::text::bigint) from pg_attribute a where a.attrelid = t.member and a.attnum > 0
          ),
          (select string_agg(concat_ws(',', i.inhparent, i.xmin), ' ' order by i.inhparent)
            from pg_inherits i where i.inhrelid = t.member),
          exists (select from pg_subscription_rel s where s.srrelid = t.member),
          -- What a reader is shown, though no row changes: who may see which row, and what the values of enums are called.
          (select sum(p.xmin::text::bigint) from pg_policy p where p.polrelid = t.member),
          -- Types of Postgres itself, whose numbers are below 16384, are not made of enums.
          case when (
            -- The largest, since EXISTS is planned as a hash over the whole catalogue.
            select max(a.atttypid) from pg_attribute a where a.attrelid = t.member and a.attnum > 0
          ) >= 16384 then rowcache.enums(t.member) end,
          (
            select string_agg(
              concat_ws(',', g.tgname, g.xmin, g.tgenabled, g.tgfoid,
                (select p.xmin from pg_proc p where p.oid = g.tgfoid)), ' ' order by g.tgname)
            from pg_trigger g
            where g.tgrelid = t.member and g.tgname >= 'zz_rowcache_' and g.tgname < 'zz_rowcache`'
          )
        ), '; ' order by t.member), 'UTF8')), 'hex') end
    from tree t
    group by t.name;
end
$$;
comment on function rowcache.fingerprints(text[]) is
  'One row per name. Changes with whatever could have let a write pass unseen; null: there is no such table';

create or replace function rowcache.described(target regclass, asked text)
  returns table (
    relation text, relkind "char", primary_key text[], key_columns text[], key_types text[], columns text[], tracked boolean,
    problems text[], fingerprint text, secret text, via text
  )
  language plpgsql stable security definer
  set search_path = pg_catalog, pg_temp
  set quote_all_identifiers = off
as $$
declare
  t rowcache.tracked_table;
  shown text := rowcache.relation_name(target);
  key name[];
begin
  if not exists (select from pg_class c where c.oid = target) then
    return query select
      null::text, null::"char", null::text[], null::text[], null::text[], '{}'::text[], false,
      array[format('there is no table %s', asked)], null::text, null::text, null::text;
    return;
  end if;
  select x.* into t from rowcache.tracked_table x where x.relation = target;
  key := coalesce(t.key_columns, rowcache.primary_key(target));
  return query select
    shown,
    (select c.relkind from pg_class c where c.oid = target),
    rowcache.primary_key(target)::text[],
    key::text[],
    (
      select array_agg(format_type(rowcache.base_type(a.atttypid), null) order by k.position)
      from unnest(key) with ordinality as k(name, position)
      left join pg_attribute a
        on a.attrelid = target and a.attname = k.name and a.attnum > 0 and not a.attisdropped
    ),
    coalesce(t.columns::text[], '{}'),
    t.relation is not null,
    array(select rowcache.problems(target)),
    (select f.fingerprint from rowcache.fingerprints(array[shown]) f),
    t.secret,
    t.via;
end
$$;
comment on function rowcache.described(regclass, text) is 'describe(), once the name has been resolved';

create or replace function rowcache.describe(name text)
  returns table (
    relation text, relkind "char", primary_key text[], key_columns text[], key_types text[], columns text[], tracked boolean,
    problems text[], fingerprint text, secret text, via text
  )
  -- No search_path of its own: a name without a schema means what it means to the caller's queries. Nothing else is
  -- looked up here.
  language plpgsql stable
as $$
declare
  found_relation pg_catalog.regclass;
begin
  begin
    found_relation := pg_catalog.to_regclass(name);
  exception when others then
    -- Not a name at all, to servers before 16; or in a schema that the caller may not look into.
    found_relation := null;
  end;
  return query select d.* from rowcache.described(found_relation, name) d;
end
$$;
comment on function rowcache.describe(text) is
  'One row on a table, also if there is none of that name (relation is null then): its key, whether it is tracked, what is wrong, the id of the secret that hashes its keys, and what carries its messages';

create or replace function rowcache.schema_version() returns int
  language sql immutable
  set search_path = pg_catalog, pg_temp
as $$
  select 1
$$;
comment on function rowcache.schema_version() is 'The version of the objects in this schema; last, so that it stands for all of them';
