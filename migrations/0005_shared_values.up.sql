-- Shared values: what services compute and not what they store, kept in tables of this schema, one for each name. They are
-- tracked like any other table, and that is all that makes them shared.
--
-- A row has a value, or a lease, or both: who computes a value holds the lease meanwhile, so that nobody else does. Renewing it
-- tells nobody anything (its columns are ignored by the triggers). Whatever removes the row also ends the lease, so that what
-- was computed before is not stored after it.
--
-- Locks: none on tables of yours. May be run again.

create or replace function rowcache.share(name text, key_types text[], logged boolean default false) returns text
  language plpgsql volatile
  set search_path = pg_catalog, pg_temp
  set quote_all_identifiers = off
as $$
declare
  shown text := format('rowcache.%I', 'shared_' || name);
  key_columns name[];
  class pg_class;
  wanted text;
  found_types text;
begin
  if name is null or name !~ '^[a-z][a-z0-9_]{0,39}$' then
    raise exception '% cannot be the name of shared values', coalesce(quote_literal(name), 'null')
      using errcode = 'invalid_name', hint = 'Up to 40 lower-case letters, digits and underscores, a letter first.';
  end if;
  if coalesce(cardinality(key_types), 0) not between 1 and 4 then
    raise exception 'the key of shared values % has no columns, or more than 4', name
      using errcode = 'invalid_parameter_value', hint = 'Name one type for each: ''{bigint}''.';
  end if;
  select array_agg(case when cardinality(key_types) = 1 then 'key' else 'key_' || n end order by n)
  into key_columns
  from generate_series(1, cardinality(key_types)) as n;
  select string_agg(format('%I %s', key_columns[n], format_type(key_types[n]::regtype, null)), ', ' order by n)
  into wanted
  from generate_series(1, cardinality(key_types)) as n;

  -- One at a time: nodes that start together open the same values.
  perform pg_advisory_xact_lock(hashtextextended('rowcache ' || shown, 0));
  select c.* into class from pg_class c where c.oid = to_regclass(shown);
  if not found then
    execute format(
      'create %s table %s (
        %s,
        value bytea,
        written_at timestamptz not null default clock_timestamp(),
        -- By its time to live; null: never.
        expires_at timestamptz,
        -- How long it may be unused; null: for as long as it likes.
        idle interval,
        -- The earlier one of both ends. A value is there until then.
        dies_at timestamptz,
        lease uuid,
        lease_until timestamptz,
        primary key (%s)
      )',
      case when logged then '' else 'unlogged' end, shown, wanted,
      (select string_agg(quote_ident(c.name), ', ' order by c.position)
        from unnest(key_columns) with ordinality as c(name, position)));
    execute format('create index on %s (dies_at) where dies_at is not null', shown);
    execute format('comment on table %s is %L', shown, 'Values that services share under the name ' || name);
  else
    select string_agg(format('%I %s', a.attname, format_type(a.atttypid, null)), ', ' order by a.attnum)
    into found_types
    from pg_attribute a
    where a.attrelid = class.oid and a.attname ~ '^key(_[1-4])?$' and not a.attisdropped;
    if found_types <> wanted then
      raise exception 'shared values % have the key (%), not (%)', name, found_types, wanted
        using errcode = 'object_not_in_prerequisite_state',
          hint = format('Use another name, or remove them: select rowcache.unshare(%L).', name);
    end if;
    if (class.relpersistence = 'u') = logged then
      raise exception 'shared values % are %logged', name, case when logged then 'not ' else '' end
        using errcode = 'object_not_in_prerequisite_state',
          hint = format('Run: alter table %s set %s', shown, case when logged then 'logged' else 'unlogged' end);
    end if;
  end if;
  -- Not for what says nothing of the value.
  return rowcache.track(shown::regclass, ignore => '{dies_at,lease,lease_until}');
end
$$;
comment on function rowcache.share(text, text[], boolean) is
  'Makes the table of shared values of this name, or sees that it is there: select rowcache.share(''permissions'', ''{bigint}'')';

create or replace function rowcache.unshare(name text) returns void
  language plpgsql volatile
  set search_path = pg_catalog, pg_temp
as $$
declare
  shown text := format('rowcache.%I', 'shared_' || name);
begin
  if to_regclass(shown) is null then
    raise exception 'there are no shared values %', coalesce(quote_literal(name), 'null') using errcode = 'undefined_table';
  end if;
  perform rowcache.untrack(shown::regclass);
  execute format('drop table %s', shown);
end
$$;
comment on function rowcache.unshare(text) is 'Removes shared values, with their table';
