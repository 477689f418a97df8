-- track(), untrack(), and what they make: one trigger function per tracked table, with triggers that name changed rows
-- by key: on the channel rowcache, or in the change log (0004).
--
-- The rules the generated code keeps:
--   * It never fails the writer's statement: messages stay below NOTIFY's 8000 bytes, and where a key cannot be told (a
--     renamed column, say) the message is "the whole table".
--   * It reads the same whatever the writer's session has set: search_path is pinned, and keys are in a canonical form
--     which no setting touches.
--   * It needs no right on this schema: writers are ordinary roles.
--   * It says which rows changed, never what is in them, beyond the key and the columns that track() was told to send.
--   * Where keys are to be hashed it runs as the owner of the table, like the triggers of a foreign key: that role may read
--     the secret, and can do nothing through the function that it could not do anyhow. Nobody else may execute it, so that
--     nobody can put it on a table of his own and have keys hashed that he guessed.
--
-- A message, less than 8000 bytes of JSON:
--   {"v":1,"t":"public.users","x":751,"k":[1,2]}                              rows by key, old and new
--   {"v":1,"t":"public.orders","x":751,"k":[["eu",7]],"c":{"user_id":[1,2]}}  key of two columns; a further column
--   {"v":1,"t":"public.sessions","x":751,"i":"0f...","h":["5a..."]}               hashes of keys, and which secret made them
--   {"v":1,"t":"public.users","x":751,"all":true}                             the whole table
--
-- Locks: none on tables of yours (track() does: see there). May be run again.

create or replace function rowcache.hmac_pad(secret bytea, filler int) returns bytea
  language sql immutable strict
  set search_path = pg_catalog, pg_temp
as $$
  -- One block of SHA-256 has 64 bytes.
  select string_agg(
    set_byte(decode('00', 'hex'), 0, filler # case when i < octet_length(secret) then get_byte(secret, i) else 0 end),
    ''::bytea order by i)
  from generate_series(0, 63) as i
$$;
comment on function rowcache.hmac_pad(bytea, int) is 'What HMAC-SHA-256 puts before a message: the secret, filled up, xor the filler';

create table if not exists rowcache.secret (
  -- Each of these uuids has 122 bits from the system's generator.
  secret bytea not null check (octet_length(secret) = 32) default sha256(
    uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())),
  -- All that follows from the secret. The id stands in messages: a node that has another secret knows that it does not
  -- understand.
  id text not null generated always as (left(encode(sha256(secret), 'hex'), 16)) stored,
  inner_pad bytea not null generated always as (rowcache.hmac_pad(secret, 54)) stored,
  outer_pad bytea not null generated always as (rowcache.hmac_pad(secret, 92)) stored
);
comment on table rowcache.secret is 'One row: what makes hashes of keys, where track() was told to send no keys. Logged, so that it survives a crash';
create unique index if not exists secret_only_one on rowcache.secret ((true));

do $$
declare
  object record;
begin
  insert into rowcache.secret default values on conflict do nothing;
  if found then
    -- Default privileges may have given it to roles that read "all tables".
    for object in
      select distinct a.grantee
      from pg_class c
      cross join aclexplode(c.relacl) a
      where c.oid = 'rowcache.secret'::regclass and a.grantee not in (0, c.relowner)
    loop
      execute format('revoke all on rowcache.secret from %s', object.grantee::regrole);
    end loop;
  end if;
end
$$;
revoke all on rowcache.secret from public;
grant select (id) on rowcache.secret to public;

create or replace function rowcache.key_secret() returns bytea
  language sql stable security definer
  set search_path = pg_catalog, pg_temp
as $$
  select s.secret from rowcache.secret s
$$;
comment on function rowcache.key_secret() is 'For the roles of services that cache tables with hashed keys; with it, guessed keys can be compared with the channel';
revoke execute on function rowcache.key_secret() from public;

create table if not exists rowcache.tracked_table (
  relation regclass primary key,
  -- As messages name it. A table that is renamed must be tracked anew.
  name text not null,
  -- Its trigger function. After a restore the table has another oid than the one in the function's name.
  function name not null unique,
  key_columns name[] not null,
  columns name[] not null,
  ignored name[] not null,
  max_keys int not null,
  level text not null check (level in ('statement', 'row')),
  -- The id of the secret with which its keys are hashed; null: keys are sent as they are.
  secret text,
  -- The WHEN condition as Postgres prints it, to see whether somebody has made another.
  condition text,
  -- What carries its messages.
  via text not null check (via in ('notify', 'log'))
);
comment on table rowcache.tracked_table is 'What track() was told. Read it through the view rowcache.tracked';

create or replace function rowcache.relation_name(relation regclass) returns text
  language sql stable
  set search_path = pg_catalog, pg_temp
as $$
  -- Whoever asks has switched quote_all_identifiers off.
  select relation::text
$$;
comment on function rowcache.relation_name(regclass) is 'The name in messages: schema-qualified, quoted where needed';

create or replace function rowcache.base_type(type oid) returns oid
  language sql stable
  set search_path = pg_catalog, pg_temp
as $$
  with recursive base(oid, typtype, typbasetype) as (
    select t.oid, t.typtype, t.typbasetype from pg_type t where t.oid = type
    union all
    select t.oid, t.typtype, t.typbasetype from base b join pg_type t on t.oid = b.typbasetype where b.typtype = 'd'
  )
  select b.oid from base b where b.typtype <> 'd'
$$;
comment on function rowcache.base_type(oid) is 'The type under a domain; any other type itself';

create or replace function rowcache.primary_key(relation regclass) returns name[]
  language sql stable
  set search_path = pg_catalog, pg_temp
as $$
  select array_agg(a.attname order by k.position)
  from pg_index i
  cross join lateral unnest(i.indkey::int2[]) with ordinality as k(attnum, position)
  join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
  -- Columns after indnkeyatts are only included, not part of the key.
  where i.indrelid = relation and i.indisprimary and k.position <= i.indnkeyatts
$$;
comment on function rowcache.primary_key(regclass) is 'Its columns in order; null if there is none';

create or replace function rowcache.tree(relation regclass) returns setof regclass
  language sql stable
  set search_path = pg_catalog, pg_temp
as $$
  with recursive tree(member) as (
    select relation::oid
    union
    select i.inhrelid
    from tree t
    join pg_inherits i on i.inhparent = t.member
    join pg_class c on c.oid = i.inhrelid
    -- Another session's temporary child is not seen by queries on its parent.
    where c.relpersistence <> 't'
  )
  select t.member::regclass from tree t
$$;
comment on function rowcache.tree(regclass) is 'The table with all its partitions or inheritance children';

create or replace function rowcache.needs_row_level(relation regclass) returns boolean
  language sql stable
  set search_path = pg_catalog, pg_temp
as $$
  select
    -- A statement on a partition or a child does not fire its parent's statement triggers, nor the other way round.
    (select count(*) > 1 from rowcache.tree(relation))
    or exists (select from pg_inherits i where i.inhrelid = relation)
    -- It will have partitions.
    or (select c.relkind = 'p' from pg_class c where c.oid = relation)
    -- Replication applies rows without firing statement triggers at all.
    or exists (select from pg_subscription_rel s where s.srrelid = relation)
$$;
comment on function rowcache.needs_row_level(regclass) is 'Whether statement triggers would miss writes to this table';

create or replace function rowcache.key_text(relation regclass, column_name name, value text) returns text
  language plpgsql stable
  set search_path = pg_catalog, pg_temp
as $$
declare
  attribute pg_attribute;
  type pg_type;
  shown_type text;
begin
  select a.* into attribute
  from pg_attribute a
  where a.attrelid = relation and a.attname = column_name and a.attnum > 0 and not a.attisdropped;
  if not found then
    raise exception 'table % has no column %', rowcache.relation_name(relation), quote_ident(column_name)
      using errcode = 'undefined_column', hint = 'Name columns of the table, in the case in which they were created.';
  end if;
  select t.* into type from pg_type t where t.oid = rowcache.base_type(attribute.atttypid);
  shown_type := format_type(attribute.atttypid, attribute.atttypmod);

  if attribute.attgenerated = 'v' then
    raise exception 'column % of table % (%) is a virtual generated column, which triggers cannot read',
        quote_ident(column_name), rowcache.relation_name(relation), shown_type
      using errcode = 'feature_not_supported', hint = 'Make it a stored generated column, or name another one.';
  end if;

  case
    when type.typtype = 'e' then
      return format('to_json((%s)::text)::text', value);
    when type.oid in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) then
      return format('(%s)::text', value);
    when type.oid in ('text'::regtype, 'varchar'::regtype) then
      if exists (
        select from pg_collation c where c.oid = attribute.attcollation and not c.collisdeterministic
      ) then
        raise exception 'column % of table % (%) has a nondeterministic collation: several texts are one key to it',
            quote_ident(column_name), rowcache.relation_name(relation), shown_type
          using errcode = 'feature_not_supported',
            hint = 'Name another column, for example a stored generated one that holds lower() of it.';
      end if;
      return format('to_json((%s)::text)::text', value);
    when type.oid in ('uuid'::regtype, 'bool'::regtype) then
      return format('''"'' || (%s)::text || ''"''', value);
    when type.oid = 'bytea'::regtype then
      return format('''"'' || encode(%s, ''hex'') || ''"''', value);
    when type.oid = 'numeric'::regtype then
      return format('''"'' || trim_scale(%s)::text || ''"''', value);
    -- Infinite ones print alike under every DateStyle; arithmetic on them fails.
    when type.oid = 'date'::regtype then
      return format(
        '''"'' || case when isfinite(%1$s) then (%1$s - ''2000-01-01''::date)::text else (%1$s)::text end || ''"''',
        value);
    when type.oid in ('timestamp'::regtype, 'timestamptz'::regtype) then
      -- By way of an interval: extract() of a timestamp itself is not exact in the last thirty years before infinity.
      return format(
        $q$'"' || case when isfinite(%1$s) then (extract(epoch from %1$s - %2$L::%3$s) * 1000000)::int8::text else (%1$s)::text end || '"'$q$,
        value, '2000-01-01 00:00:00+00', type.typname);
    else
      raise exception 'column % of table % has type %, of which rowcache knows no canonical text',
          quote_ident(column_name), rowcache.relation_name(relation), shown_type
        using errcode = 'feature_not_supported',
          hint = 'Usable types: smallint, integer, bigint, text, varchar, uuid, boolean, enums, bytea, date, timestamp,'
            ' timestamptz, numeric, and domains over these. Name other columns.';
  end case;
end
$$;
comment on function rowcache.key_text(regclass, name, text) is
  'SQL that turns a value of the column (given as SQL) into its canonical JSON; refuses types that have none';

create or replace function rowcache.log_insert() returns text
  language sql immutable
  set search_path = pg_catalog, pg_temp
as $$
  select $source$    case (pg_current_xact_id()::text::bigint >> 19) % 3
      when 0 then insert into rowcache.change_log_0 (message) values (message);
      when 1 then insert into rowcache.change_log_1 (message) values (message);
      else insert into rowcache.change_log_2 (message) values (message);
    end case;$source$
$$;
comment on function rowcache.log_insert() is
  'The statement of a trigger that puts `message` into the bin of the change log that is the transaction''s (see 0004)';

create or replace function rowcache.trigger_source(t rowcache.tracked_table) returns text
  language plpgsql stable
  set search_path = pg_catalog, pg_temp
  set quote_all_identifiers = off
as $$
declare
  -- SQL for the key, and for each further column, of a row whose alias replaces %1$s.
  key_sql text;
  column_sql text[];
  -- Parts of messages.
  opening text := format('%L || pg_current_xact_id()::text', format('{"v":1,"t":%s,"x":', to_json(t.name)));
  list text := ',"k":[';
  whole_table text := opening || $q$ || ',"all":true}'$q$;
  ending text := $q$']}'$q$;
  ending_of_chunk text := $q$']}'$q$;
  -- Parts that grow with the further columns.
  declarations text := '';
  label text := '';
  secret_read text := '';
  row_size text := 'octet_length(r.k)';
  -- One aggregate for the keys and their number: each costs a statement some 2 us.
  gathered text := 'array_agg(r.k)';
  gathered_into text := 'row_keys';
  nothing text := 'keys is null';
  nothing_in_row text := 'r.k is null';
  -- Bytes. A chunk ends with the row that passes chunk_bytes, and no row has more than row_bytes; together with their
  -- commas they fit into room, which is what the rest of a message leaves of NOTIFY's limit.
  room int := 7999 - octet_length(format(
    '{"v":1,"t":%s,"x":18446744073709551615,"i":"0123456789abcdef","h":[],"c":{}}', to_json(t.name)));
  chunk_bytes int;
  row_bytes int;
  -- Queries for the changed rows, and what is made of them.
  changed text;
  really_changed text;
  row_keys text;
  statement_keys text;
  statement_longest text;
  statement_chunks text;
  counter text := quote_literal('rowcache.rows_' || t.relation::oid);
  -- How a message is sent.
  send text := case t.via when 'notify' then $q$perform pg_notify('rowcache', $q$ else 'perform rowcache.log_change(' end;
  send_one text := '    ' || send || 'message);';
  send_all text := '      ' || send || whole_table || ');';
begin
  if t.via = 'log' then
    -- In line, for it is what most statements come to: what rowcache.log_change() does.
    send_one := rowcache.log_insert();
    -- NOTIFY drops what a transaction has sent already; the log does not. The setting ends and rolls back like the row.
    send_all := format($q$      if row_count = %1$s then
        perform set_config(%2$s, (row_count + 1)::text, true);
        perform rowcache.log_change(%3$s);
      end if;$q$, t.max_keys, counter, whole_table);
  end if;

  select
    case when count(*) = 1 then min(k.sql) else $q$'[' || $q$ || string_agg(k.sql, $q$ || ',' || $q$ order by k.position)
      || $q$ || ']'$q$ end
    into key_sql
  from (
    select rowcache.key_text(t.relation, name, '%1$s.' || replace(quote_ident(name), '%', '%%')), position
    from unnest(t.key_columns) with ordinality as u(name, position)
  ) as k(sql, position);

  if t.secret is not null then
    -- HMAC-SHA-256 of the text that would be sent, cut to 16 bytes. Variables are named with their block, so that no column
    -- of the table can be meant.
    key_sql := $q$'"' || encode(substr(sha256(hmac.outer_pad || sha256(hmac.inner_pad || convert_to($q$ || key_sql
      || $q$, 'UTF8'))), 1, 16), 'hex') || '"'$q$;
    list := format(',"i":"%s","h":[', t.secret);
    label := e'<<hmac>>\n';
    declarations := e'\n  inner_pad bytea;\n  outer_pad bytea;';
    -- Without it nothing can be told but "the whole table".
    secret_read := format(e'\n      select s.inner_pad, s.outer_pad into strict hmac.inner_pad, hmac.outer_pad'
      ' from rowcache.secret s where s.id = %L;', t.secret);
  end if;

  select
    coalesce(array_agg(rowcache.key_text(t.relation, name, '%1$s.' || replace(quote_ident(name), '%', '%%'))
      order by position), '{}')
    into column_sql
  from unnest(t.columns) with ordinality as u(name, position);

  if cardinality(t.columns) > 0 then
    select
      declarations || string_agg(format(e'\n  c%s text;', position), '' order by position),
      'coalesce(octet_length(r.k), 0)'
        || string_agg(format(' + coalesce(octet_length(r.c%s), 0)', position), '' order by position),
      gathered || string_agg(format($q$, string_agg(distinct r.c%s, ',')$q$, position), '' order by position),
      gathered_into || string_agg(format(', c%s', position), '' order by position),
      nothing || string_agg(format(' and c%s is null', position), '' order by position),
      nothing_in_row || string_agg(format(' and r.c%s is null', position), '' order by position),
      $q$'],"c":{'$q$ || string_agg(format($q$ || %L || coalesce(c%s, '') || ']'$q$, head, position), '' order by position)
        || $q$ || '}}'$q$,
      $q$'],"c":{'$q$ || string_agg(format($q$ || %L || coalesce(string_agg(distinct r.c%s, ','), '') || ']'$q$, head, position),
        '' order by position) || $q$ || '}}'$q$,
      room - sum(octet_length(head) + 1)::int
      into declarations, row_size, gathered, gathered_into, nothing, nothing_in_row, ending, ending_of_chunk, room
    from (
      select position, case when position > 1 then ',' else '' end || to_json(name::text) || ':['
      from unnest(t.columns) with ordinality as u(name, position)
    ) as c(position, head);
  end if;
  if room < 2000 then
    raise exception 'the names of % columns of table % do not fit into a message', cardinality(t.columns), t.name
      using errcode = 'program_limit_exceeded', hint = 'Send fewer columns.';
  end if;
  -- A row brings a comma for its key and for each of its columns.
  chunk_bytes := least(3500, room / 2);
  row_bytes := least(4000, room - chunk_bytes) - 1 - cardinality(t.columns);

  -- One row, in a row trigger. Where statement triggers tell the new key, the row trigger exists for the old one.
  select
    secret_read || e'\n' || string_agg(
      case when t.level = 'statement' then
        format(e'      %s := %s;\n', variable, format(sql, 'old'))
      else
        format(
          e'      %1$s := case tg_op\n'
          '        when ''INSERT'' then %2$s\n'
          '        when ''DELETE'' then %3$s\n'
          '        else concat_ws('','', %2$s, nullif(%3$s, %2$s))\n'
          '      end;\n',
          variable, format(sql, 'new'), format(sql, 'old'))
      end, '' order by position)
    into row_keys
  from (
    select 0, 'keys', key_sql
    union all
    select position, 'c' || position, sql from unnest(column_sql) with ordinality as u(sql, position)
  ) as v(position, variable, sql);

  -- The rows of a statement.
  select
    format('select %s as k', format(key_sql, 'r'))
      || coalesce(string_agg(format(', %s as c%s', format(sql, 'r'), position), '' order by position), '')
      || ' from changed_rows r'
    into changed
  from unnest(column_sql) with ordinality as u(sql, position);

  -- *<> compares stored bytes: 1.0 and 1.00 are equal numbers but not the same to a reader, and json has no equality at
  -- all. A virtual generated column is not there to be compared; it follows from the others.
  select
    changed
      || format(' left join old_rows o on %s where o.%I is null or row(%s)::record *<> row(%s)::record',
        (select string_agg(format('o.%1$I = r.%1$I', name), ' and ') from unnest(t.key_columns) as name),
        t.key_columns[1],
        string_agg(format('o.%I', a.attname), ', ' order by a.attnum),
        string_agg(format('r.%I', a.attname), ', ' order by a.attnum))
    into really_changed
  from pg_attribute a
  where a.attrelid = t.relation and a.attnum > 0 and not a.attisdropped and a.attgenerated <> 'v'
    and a.attname <> all (t.ignored);

  -- One row more than the limit is enough to know that there are too many.
  select
    string_agg(format($source$
      select %s into %s
      from (%s limit %s) r;$source$, gathered, gathered_into, query, t.max_keys::bigint + 1), position_else order by position),
    string_agg(format($source$
    select max(%s) into longest from (%s) r;$source$, row_size, query), position_else order by position),
    string_agg(format($source$
    %s%s || %L || coalesce(string_agg(r.k, ','), '') || %s)
    from (
      select r.*, sum(%s + %s) over (rows unbounded preceding) / %s as chunk
      from (%s) r
      where not (%s)
    ) r
    group by r.chunk;$source$, send, opening, list, ending_of_chunk, row_size, 1 + cardinality(t.columns), chunk_bytes, query,
      nothing_in_row), position_else order by position)
    into statement_keys, statement_longest, statement_chunks
  from (
    select 1, really_changed, '' where cardinality(t.ignored) > 0
    union all
    select 2, changed, e'\n    else'
  ) as q(position, query, position_else);
  if cardinality(t.ignored) > 0 then
    statement_keys := e'\n    if tg_op = ''UPDATE'' then' || statement_keys || e'\n    end if;';
    statement_longest := e'\n    if tg_op = ''UPDATE'' then' || statement_longest || e'\n    end if;';
    statement_chunks := e'\n    if tg_op = ''UPDATE'' then' || statement_chunks || e'\n    end if;';
  end if;

  return format($source$
-- Made by rowcache.track() for %1$s. Do not edit: rowcache.problems() would notice. Track the table again instead.
%10$sdeclare
  row_count bigint;
  longest int;
  row_keys text[];
  keys text;%2$s
  message text;
begin
  if tg_op = 'TRUNCATE' then
    %12$s%3$s);
    return null;
  end if;

  if tg_level = 'ROW' then
    -- A row trigger cannot count the rows of its statement. It counts those of the transaction, in a setting that ends
    -- and rolls back with it. Beyond the limit all messages are the same one, which is sent once.
    message := current_setting(%4$s, true);
    row_count := case when message ~ '^[0-9]{1,9}$' then message::int else 0 end;
    if row_count >= %6$s then
%13$s
      return null;
    end if;
    begin%5$s    exception when others then
      -- Most likely a column was renamed. The writer's statement must not fail for that.
      %12$s%3$s);
      return null;
    end;
    if %7$s then
      return null;
    end if;
    perform set_config(%4$s, (row_count + 1)::text, true);
    message := %8$s || %11$L || coalesce(keys, '') || %9$s;
    if octet_length(message) >= 8000 then
      message := %3$s;
    end if;
%14$s
    return null;
  end if;
$source$,
    -- A line break in a name must not end the comment.
    translate(t.name, e'\n\r', '  '), declarations, whole_table, counter, row_keys, t.max_keys, nothing, opening, ending,
    label, list, send, send_all, send_one)
  || case t.level when 'row' then $source$
  return null;
end
$source$ else format($source$
  begin%1$s
    row_count := cardinality(row_keys);
  exception when others then
    row_count := %2$s + 1;
  end;
  if row_count > %2$s then
    %11$s%4$s);
    return null;
  end if;
  keys := nullif(array_to_string(row_keys, ','), '');
  if %5$s then
    return null;
  end if;
  message := %6$s || %10$L || coalesce(keys, '') || %7$s;
  if octet_length(message) < 8000 then
%12$s
  else%13$s
    if longest > %3$s then
      %11$s%4$s);
      return null;
    end if;
    -- A chunk ends with the row that passes %8$s bytes.%9$s
  end if;
  return null;
end
$source$,
    secret_read || statement_keys, t.max_keys, row_bytes, whole_table, nothing, opening, ending, chunk_bytes,
    statement_chunks, list, send, send_one, statement_longest)
  end;
end
$$;
comment on function rowcache.trigger_source(rowcache.tracked_table) is 'The body of the trigger function that track() makes';

create or replace function rowcache.expected_triggers(relation regclass, level text, ignores boolean)
  returns table (
    member regclass, name name, event text, per_row boolean, type int, new_table name, old_table name, conditional boolean,
    cloned boolean
  )
  language sql stable
  set search_path = pg_catalog, pg_temp
as $$
  select
    m.member, t.name, t.event, t.per_row,
    -- The bits of pg_trigger.tgtype.
    (case when t.per_row then 1 else 0 end)
      | (case t.event when 'insert' then 4 when 'delete' then 8 when 'update' then 16 else 32 end),
    t.new_table, t.old_table, t.conditional,
    -- Postgres itself puts a row trigger of a partitioned table on the partitions.
    t.per_row and m.member <> expected_triggers.relation
      and (select c.relkind = 'p' from pg_class c where c.oid = expected_triggers.relation)
  from rowcache.tree(relation) as m(member)
  cross join (
    values
      -- Insert and delete use one name for their rows, so that one query serves both.
      ('statement', 'zz_rowcache_insert'::name, 'insert', false, 'changed_rows'::name, null::name, false),
      ('statement', 'zz_rowcache_update', 'update', false, 'changed_rows', case when ignores then 'old_rows' end, false),
      ('statement', 'zz_rowcache_delete', 'delete', false, null, 'changed_rows', false),
      ('statement', 'zz_rowcache_rekey', 'update', true, null, null, true),
      ('statement', 'zz_rowcache_truncate', 'truncate', false, null, null, false),
      ('row', 'zz_rowcache_insert', 'insert', true, null, null, false),
      ('row', 'zz_rowcache_update', 'update', true, null, null, ignores),
      ('row', 'zz_rowcache_delete', 'delete', true, null, null, false),
      ('row', 'zz_rowcache_truncate', 'truncate', false, null, null, false)
  ) as t(level, name, event, per_row, new_table, old_table, conditional)
  where t.level = expected_triggers.level
$$;
comment on function rowcache.expected_triggers(regclass, text, boolean) is
  'The triggers a tracked table, its partitions and its children must have, enabled ALWAYS';

create or replace function rowcache.track_call(t rowcache.tracked_table) returns text
  language sql stable
  set search_path = pg_catalog, pg_temp
as $$
  select format('select rowcache.track(%L', coalesce(
      (select rowcache.relation_name(t.relation) from pg_class c where c.oid = t.relation), t.name))
    || case when t.key_columns is distinct from rowcache.primary_key(t.relation)
      then format(', key => %L', t.key_columns) else '' end
    || case when t.columns <> '{}' then format(', columns => %L', t.columns) else '' end
    || case when t.ignored <> '{}' then format(', ignore => %L', t.ignored) else '' end
    || case when t.max_keys <> 10000 then format(', max_keys => %s', t.max_keys) else '' end
    || case when t.level = 'row' and not rowcache.needs_row_level(t.relation) then ', level => ''row''' else '' end
    || case when t.secret is not null then ', hash_keys => true' else '' end
    || case when t.via = 'log' then ', via => ''log''' else '' end
    || ')'
$$;
comment on function rowcache.track_call(rowcache.tracked_table) is 'The statement that tracks the table again, as it is tracked now';

create or replace function rowcache.problems(relation regclass) returns setof text
  -- Definer, because the table it reads is private.
  language plpgsql stable security definer
  set search_path = pg_catalog, pg_temp
  set quote_all_identifiers = off
as $$
declare
  t rowcache.tracked_table;
  shown text := rowcache.relation_name(relation);
  cure text;
  source text;
  owner regrole;
begin
  select x.* into t from rowcache.tracked_table x where x.relation = problems.relation;
  if not found then
    return next format('%s is not tracked: select rowcache.track(%L)', shown, shown);
    return;
  end if;
  if not exists (select from pg_class c where c.oid = relation) then
    return next format('%s is gone: select rowcache.untrack(%s::regclass)', t.name, relation::oid);
    return;
  end if;
  cure := ': ' || rowcache.track_call(t);

  if shown <> t.name then
    return next format('%s was tracked as %s, and its messages still say so', shown, t.name) || cure;
  end if;
  if t.level = 'statement' and rowcache.needs_row_level(relation) then
    return next format('%s has partitions, children, a parent or a subscription by now and needs row triggers', shown)
      || cure;
  end if;

  if t.secret is not null and not exists (select from rowcache.secret s where s.id = t.secret) then
    return next format('the secret has changed since %s was tracked, and its messages say no more than "the whole table"', shown)
      || cure;
    return;
  end if;

  begin
    source := rowcache.trigger_source(t);
  exception when others then
    return next format('%s can no longer be tracked like this (%s)', shown, sqlerrm) || cure;
    return;
  end;
  if not exists (
    select
    from pg_proc p
    join pg_namespace n on n.oid = p.pronamespace
    join pg_language l on l.oid = p.prolang
    where n.nspname = 'rowcache' and p.proname = t.function and p.pronargs = 0 and l.lanname = 'plpgsql'
      and p.prosrc = source and p.prosecdef = (t.secret is not null)
      and p.proconfig @> array['search_path=pg_catalog, pg_temp']
  ) then
    return next format('function rowcache.%I() is not what track() makes of %s today', t.function, shown) || cure;
  end if;

  if t.secret is not null then
    select c.relowner::regrole into owner from pg_class c where c.oid = relation;
    if not exists (
      select
      from pg_proc p
      where p.pronamespace = 'rowcache'::regnamespace and p.proname = t.function and p.proowner = owner
        and not exists (
          -- No list at all means that everybody may.
          select from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a where a.grantee <> p.proowner
        )
    ) then
      return next format('function rowcache.%I() must belong to %s, the owner of %s, and nobody else may execute it',
        t.function, owner, shown) || cure;
    end if;
    if not has_column_privilege(owner, 'rowcache.secret', 'inner_pad', 'select') then
      return next format('%s, the owner of %s, may not read the secret: grant select on rowcache.secret to %1$s', owner, shown);
    end if;
  end if;

  return query
    select
      format('trigger %s on %s %s', e.name, rowcache.relation_name(e.member),
        case
          when g.oid is null then 'is missing'
          when p.pronamespace <> 'rowcache'::regnamespace or p.proname <> t.function then 'calls another function'
          when g.tgtype <> e.type
            or g.tgnewtable is distinct from e.new_table or g.tgoldtable is distinct from e.old_table
            or (g.tgqual is not null) <> e.conditional
            or e.conditional
              and substring(pg_get_triggerdef(g.oid) from ' WHEN (.*) EXECUTE FUNCTION ') is distinct from t.condition
            then 'is not as track() makes it'
          when g.tgenabled = 'D' then 'is disabled'
          else 'is not enabled ALWAYS'
        end) || cure
    from rowcache.expected_triggers(relation, t.level, cardinality(t.ignored) > 0) e
    left join pg_trigger g on g.tgrelid = e.member and g.tgname = e.name
    left join pg_proc p on p.oid = g.tgfoid
    where g.oid is null
      or g.tgenabled <> 'A'
      or p.pronamespace <> 'rowcache'::regnamespace or p.proname <> t.function
      or g.tgtype <> e.type
      or g.tgnewtable is distinct from e.new_table or g.tgoldtable is distinct from e.old_table
      or (g.tgqual is not null) <> e.conditional
      or e.conditional
        and substring(pg_get_triggerdef(g.oid) from ' WHEN (.*) EXECUTE FUNCTION ') is distinct from t.condition;
end
$$;
comment on function rowcache.problems(regclass) is
  'Why writes to the table might go unseen, one line each with its cure; no line: it is tracked as it should be';

create or replace function rowcache.track(
  relation regclass,
  key name[] default null,
  columns name[] default '{}',
  ignore name[] default '{}',
  max_keys int default 10000,
  level text default 'auto',
  hash_keys boolean default false,
  via text default 'notify'
) returns text
  language plpgsql volatile
  set search_path = pg_catalog, pg_temp
  set quote_all_identifiers = off
as $$
declare
  class pg_class;
  wanted rowcache.tracked_table;
  shown text := rowcache.relation_name(relation);
  row_needed boolean;
  name name;
  related regclass;
  virtual_column name;
  secret text;
  object record;
begin
  select c.* into class from pg_class c where c.oid = relation;
  if not found then
    raise exception 'there is no table with oid %', relation::oid using errcode = 'undefined_table';
  end if;
  if class.relkind not in ('r', 'p') then
    raise exception '% is %, which cannot be tracked', shown,
        case class.relkind
          when 'v' then 'a view' when 'm' then 'a materialized view' when 'f' then 'a foreign table'
          when 'i' then 'an index' when 'I' then 'a partitioned index' when 'S' then 'a sequence'
          when 'c' then 'a composite type' else 'a TOAST table'
        end
      using errcode = 'wrong_object_type',
        hint = 'Track the tables it reads; a service can build an entry from several of them.';
  end if;
  if class.relpersistence = 't' then
    raise exception '% is a temporary table, which cannot be tracked', shown
      using errcode = 'wrong_object_type', hint = 'Only its own session sees it. Use a permanent table.';
  end if;
  if relation::oid < 16384 or class.relnamespace = 'pg_catalog'::regnamespace
    -- Those that share() makes hold values of services.
    or class.relnamespace = 'rowcache'::regnamespace and class.relname not like 'shared\_%'
  then
    raise exception '% is a system table, which cannot be tracked', shown
      using errcode = 'wrong_object_type', hint = 'Track a table of your own.';
  end if;
  select m.member into related
  from rowcache.tree(relation) as m(member)
  join pg_class c on c.oid = m.member
  where c.relkind = 'f' limit 1;
  if found then
    raise exception '% cannot be tracked: its part % is a foreign table', shown, rowcache.relation_name(related)
      using errcode = 'wrong_object_type', hint = 'Writes at the other server would go unseen. Track the local parts.';
  end if;

  -- Options.
  if max_keys is null or max_keys not between 1 and 1000000 then
    raise exception 'max_keys is %, not between 1 and 1000000', coalesce(max_keys::text, 'null')
      using errcode = 'invalid_parameter_value', hint = 'The default is 10000.';
  end if;
  if level is null or level not in ('auto', 'statement', 'row') then
    raise exception 'level is %, not auto, statement or row', coalesce(quote_literal(level), 'null')
      using errcode = 'invalid_parameter_value', hint = 'Leave it out: auto takes what the table needs.';
  end if;
  if hash_keys is null then
    raise exception 'hash_keys is null, not true or false'
      using errcode = 'invalid_parameter_value', hint = 'The default is false.';
  end if;
  if via is null or via not in ('notify', 'log') then
    raise exception 'via is %, not notify or log', coalesce(quote_literal(via), 'null')
      using errcode = 'invalid_parameter_value', hint = 'The default is notify.';
  end if;
  if via = 'log' and to_regclass('rowcache.change_log') is null then
    raise exception 'there is no change log in this database'
      using errcode = 'object_not_in_prerequisite_state', hint = 'Run the migrations up to 0004: rowcache migrate up';
  end if;
  columns := coalesce(columns, '{}');
  ignore := coalesce(ignore, '{}');
  if key is null then
    key := rowcache.primary_key(relation);
    if key is null then
      raise exception 'table % has no primary key', shown
        using errcode = 'invalid_table_definition',
          hint = format('Add one, or name the columns of a key: select rowcache.track(%L, key => ''{column,column}'').', shown);
    end if;
  end if;
  if cardinality(key) = 0 then
    raise exception 'the key of table % has no columns', shown
      using errcode = 'invalid_parameter_value', hint = 'Leave key out to take the primary key.';
  end if;
  foreach name in array key || columns || ignore loop
    if not exists (
      select from pg_attribute a
      where a.attrelid = relation and a.attname = name and a.attnum > 0 and not a.attisdropped
    ) then
      raise exception 'table % has no column %', shown, coalesce(quote_ident(name), 'null')
        using errcode = 'undefined_column', hint = 'Name columns of the table, in the case in which they were created.';
    end if;
    if name = any (ignore) and name = any (key || columns) then
      raise exception 'column % of table % is to be both sent and ignored', quote_ident(name), shown
        using errcode = 'invalid_parameter_value', hint = 'Take it out of ignore, or out of key and columns.';
    end if;
  end loop;
  if (select count(*) <> count(distinct u.name) from unnest(key) as u(name))
    or (select count(*) <> count(distinct u.name) from unnest(columns) as u(name))
  then
    raise exception 'a column of table % is named twice', shown
      using errcode = 'duplicate_column', hint = 'Name each column once in key and once in columns.';
  end if;
  select a.attname, r.attname into virtual_column, name
  from pg_attribute a
  join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
  join pg_depend x on x.refclassid = 'pg_class'::regclass and x.refobjid = a.attrelid
    and (x.classid, x.objid) in (('pg_attrdef'::regclass, d.oid))
  join pg_attribute r on r.attrelid = a.attrelid and r.attnum = x.refobjsubid
  where a.attrelid = relation and a.attgenerated = 'v' and r.attname = any (ignore) and a.attname <> all (ignore)
  limit 1;
  if found then
    raise exception 'column % of table % cannot be ignored: the virtual generated column % shows it',
        quote_ident(name), shown, quote_ident(virtual_column)
      using errcode = 'invalid_parameter_value', hint = format('Ignore %I as well.', virtual_column);
  end if;

  if hash_keys then
    if columns <> '{}' then
      raise exception 'the keys of % are to be hashed, and its columns % sent as they are', shown, columns
        using errcode = 'invalid_parameter_value', hint = 'Leave out columns, or hash_keys.';
    end if;
    if not has_column_privilege(class.relowner, 'rowcache.secret', 'inner_pad', 'select') then
      raise exception '%, the owner of %, may not read the secret that hashes its keys', class.relowner::regrole, shown
        using errcode = 'insufficient_privilege',
          hint = format('Run: grant select on rowcache.secret to %s', class.relowner::regrole);
    end if;
    select s.id into strict secret from rowcache.secret s;
  end if;

  row_needed := rowcache.needs_row_level(relation);
  if level = 'statement' and row_needed then
    raise exception 'statement triggers would miss writes to %', shown
      using errcode = 'invalid_parameter_value',
        detail = 'It is partitioned, a partition, has children or a parent, or receives a subscription.',
        hint = 'Leave level out.';
  end if;
  if level = 'auto' then
    level := case
      when row_needed then 'row'
      -- To see what an UPDATE changed, old and new rows are joined by key. Without a unique key that can be quadratic.
      when ignore <> '{}' and not exists (
        select
        from pg_index i
        where i.indrelid = relation and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
          and not exists (
            select
            from unnest(i.indkey::int2[]) with ordinality as k(attnum, position)
            join pg_attribute a on a.attrelid = relation and a.attnum = k.attnum
            where k.position <= i.indnkeyatts and a.attname <> all (key)
          )
      ) then 'row'
      else 'statement'
    end;
  end if;

  wanted := (
    relation, shown, 'changed_' || relation::oid, key, columns, ignore, max_keys, level, secret, null, via
  )::rowcache.tracked_table;
  -- Refuses types before anything is locked.
  perform rowcache.trigger_source(wanted);

  -- As it is already: nothing is locked, and no node has to look again.
  if exists (
    select
    from rowcache.tracked_table t
    where t.relation = wanted.relation
      and (t.name, t.key_columns, t.columns, t.ignored, t.max_keys, t.level, t.via)
        = (wanted.name, wanted.key_columns, wanted.columns, wanted.ignored, wanted.max_keys, wanted.level, wanted.via)
      and t.secret is not distinct from wanted.secret
  ) and not exists (select from rowcache.problems(relation)) then
    return shown;
  end if;

  -- One track() at a time; then writers of this table (and of its partitions and children) wait until this commits, so
  -- that none is between the old triggers and the new ones.
  lock table rowcache.tracked_table in share row exclusive mode;
  execute format('lock table %s in share row exclusive mode', shown);

  -- Leftovers of tables that were dropped.
  for object in
    select t.relation::oid as relation
    from rowcache.tracked_table t
    where not exists (select from pg_class c where c.oid = t.relation)
  loop
    perform rowcache.untrack(object.relation::regclass);
  end loop;

  with recursive ancestors(member) as (
    select relation::oid
    union
    select i.inhparent from ancestors a join pg_inherits i on i.inhrelid = a.member
  )
  select t.relation into related
  from rowcache.tracked_table t
  where t.relation <> track.relation
    and (t.relation in (select a.member from ancestors a) or t.relation in (select rowcache.tree(track.relation)))
  limit 1;
  if found then
    raise exception '% and %, of which one is a part of the other, cannot both be tracked',
        shown, rowcache.relation_name(related)
      using errcode = 'object_not_in_prerequisite_state',
        hint = format('Track the whole only: select rowcache.untrack(%L).', rowcache.relation_name(related));
  end if;

  -- A restored table has another oid than its function's name says; keep the name, and never take another table's.
  select t.function into name from rowcache.tracked_table t where t.relation = track.relation;
  if found then
    wanted.function := name;
  end if;
  while exists (
    select from rowcache.tracked_table t where t.function = wanted.function and t.relation <> track.relation
  ) loop
    wanted.function := wanted.function || '_2';
  end loop;

  execute format(
    'create or replace function rowcache.%I() returns trigger language plpgsql%s%s set search_path = pg_catalog, pg_temp as %L',
    wanted.function,
    case when hash_keys then ' security definer' else ' security invoker' end,
    -- A cached plan was made for the rows of its first statement. One row then, and a million now, must not be a nested
    -- loop.
    case when ignore <> '{}' and level = 'statement' then ' set enable_nestloop = off' else '' end,
    rowcache.trigger_source(wanted));
  execute format('comment on function rowcache.%I() is %L', wanted.function, 'Trigger function of ' || shown);
  if hash_keys then
    -- The owner can have it do whatever he likes, by changing the type of a column; so it must be his.
    for object in
      select p.proowner, a.grantee
      from pg_proc p
      left join aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a on a.grantee <> p.proowner
      where p.pronamespace = 'rowcache'::regnamespace and p.proname = wanted.function
    loop
      if object.grantee is not null then
        execute format('revoke all on function rowcache.%I() from %s', wanted.function,
          case object.grantee when 0 then 'public' else object.grantee::regrole::text end);
      end if;
      if object.proowner <> class.relowner then
        execute format('alter function rowcache.%I() owner to %s', wanted.function, class.relowner::regrole);
      end if;
    end loop;
  else
    -- Public may execute it, as any trigger function: creating a partition clones its triggers with that partition's
    -- owner's rights.
    execute format('grant execute on function rowcache.%I() to public', wanted.function);
  end if;

  for object in
    select g.tgname, g.tgrelid::regclass as relation
    from rowcache.tree(relation) as m(member)
    join pg_trigger g on g.tgrelid = m.member and g.tgname like 'zz\_rowcache\_%' and g.tgparentid = 0
    where not exists (
      select from rowcache.expected_triggers(relation, level, ignore <> '{}') e
      where e.member = m.member and e.name = g.tgname and not e.cloned and e.per_row = (g.tgtype & 1 = 1)
    )
  loop
    execute format('drop trigger %I on %s', object.tgname, rowcache.relation_name(object.relation));
  end loop;

  for object in
    select e.* from rowcache.expected_triggers(relation, level, ignore <> '{}') e where not e.cloned
  loop
    execute format(
      'create or replace trigger %I after %s on %s%s%s%s for each %s%s execute function rowcache.%I()',
      object.name, object.event, rowcache.relation_name(object.member),
      case when coalesce(object.new_table, object.old_table) is not null then ' referencing' else '' end,
      ' new table as ' || object.new_table, ' old table as ' || object.old_table,
      case when object.per_row then 'row' else 'statement' end,
      case
        when not object.conditional then ''
        when level = 'statement' then (
          select format(' when (%s)', string_agg(format('old.%1$I is distinct from new.%1$I', u.name), ' or '))
          from unnest(key || columns) as u(name)
        )
        else (
          select format(' when (row(%s)::record operator(pg_catalog.*<>) row(%s)::record)',
            string_agg(format('old.%I', a.attname), ', ' order by a.attnum),
            string_agg(format('new.%I', a.attname), ', ' order by a.attnum))
          from pg_attribute a
          where a.attrelid = track.relation and a.attnum > 0 and not a.attisdropped and a.attgenerated <> 'v'
            and a.attname <> all (ignore)
        )
      end,
      wanted.function);
    execute format('alter table %s%s enable always trigger %I',
      -- Of a partitioned table the clones are enabled with it.
      case when object.per_row and class.relkind = 'p' then '' else 'only ' end,
      rowcache.relation_name(object.member), object.name);
    if object.conditional and object.member = relation then
      select substring(pg_get_triggerdef(g.oid) from ' WHEN (.*) EXECUTE FUNCTION ') into wanted.condition
      from pg_trigger g where g.tgrelid = relation and g.tgname = object.name;
    end if;
  end loop;

  delete from rowcache.tracked_table t where t.relation = track.relation;
  insert into rowcache.tracked_table values (wanted.*);
  return shown;
end
$$;
comment on function rowcache.track(regclass, name[], name[], name[], int, text, boolean, text) is
  'Puts triggers on a table and on its partitions or children. Writers wait for it, readers do not. Returns the name that messages have';

create or replace function rowcache.untrack(relation regclass) returns boolean
  language plpgsql volatile
  set search_path = pg_catalog, pg_temp
  set quote_all_identifiers = off
as $$
declare
  object record;
  function_name name;
  found_any boolean := false;
begin
  for object in
    select g.tgname, g.tgrelid::regclass as relation
    from rowcache.tree(relation) as m(member)
    join pg_trigger g on g.tgrelid = m.member and g.tgname like 'zz\_rowcache\_%' and g.tgparentid = 0
    -- A part may be tracked on its own.
    where m.member = untrack.relation
      or not exists (select from rowcache.tracked_table t where t.relation = m.member)
  loop
    execute format('drop trigger %I on %s', object.tgname, rowcache.relation_name(object.relation));
    found_any := true;
  end loop;

  delete from rowcache.tracked_table t where t.relation = untrack.relation returning t.function into function_name;
  if found then
    found_any := true;
  else
    function_name := 'changed_' || relation::oid;
  end if;
  if exists (
    select from pg_proc p
    where p.pronamespace = 'rowcache'::regnamespace and p.proname = function_name
  ) and not exists (select from rowcache.tracked_table t where t.function = function_name) then
    execute format('drop function rowcache.%I()', function_name);
    found_any := true;
  end if;
  return found_any;
end
$$;
comment on function rowcache.untrack(regclass) is
  'Takes everything that track() has put on a table away, also what is left of it. False: there was nothing. Readers wait for it, too';

create or replace view rowcache.tracked as
select
  t.name as relation,
  t.key_columns::text[] as key_columns,
  t.columns::text[] as columns,
  t.ignored::text[] as ignored,
  t.max_keys,
  t.level,
  t.secret is not null as hash_keys,
  array(select rowcache.problems(t.relation)) as problems,
  t.via
from rowcache.tracked_table t;
comment on view rowcache.tracked is 'The tracked tables and how. problems: empty if all is well';
grant select on rowcache.tracked to public;

-- Who tracks a table must own it, and may write here; that is not for everyone.
revoke execute on function
  rowcache.track(regclass, name[], name[], name[], int, text, boolean, text),
  rowcache.untrack(regclass),
  rowcache.key_text(regclass, name, text),
  rowcache.trigger_source(rowcache.tracked_table),
  rowcache.expected_triggers(regclass, text, boolean),
  rowcache.track_call(rowcache.tracked_table)
from public;
