-- +goose Up

-- INTEGER PRIMARY KEY makes a column the row's own key in SQLite, which saves an index.

-- One row: which installation this is, and how often it was restored.
CREATE TABLE installation (
    id          BIGINT    NOT NULL PRIMARY KEY CHECK (id = 1),
    uid         TEXT      NOT NULL,
    generation  BIGINT    NOT NULL,
    created_at  TIMESTAMP NOT NULL
);

-- Numbers that only rise. 'pos' orders everything that is tailed or exported.
CREATE TABLE counters (
    name   TEXT   NOT NULL PRIMARY KEY,
    value  BIGINT NOT NULL
);
INSERT INTO counters (name, value) VALUES ('pos', 0), ('revision', 0), ('internal', 0), ('spool', 0), ('action', 0), ('revocations', 0);

CREATE TABLE tenants (
    id          TEXT      NOT NULL PRIMARY KEY,
    name        TEXT      NOT NULL,
    created_at  TIMESTAMP NOT NULL
);

CREATE TABLE nodes (
    id             TEXT      NOT NULL PRIMARY KEY,
    tenant         TEXT      NOT NULL REFERENCES tenants (id),
    name           TEXT      NOT NULL,
    state          TEXT      NOT NULL,
    state_reason   TEXT      NOT NULL,
    state_since    TIMESTAMP NOT NULL,
    key_hash       TEXT      NOT NULL,
    join_id        TEXT      NOT NULL,
    allow_tags     TEXT      NOT NULL,
    installation   TEXT      NOT NULL,
    boot           TEXT      NOT NULL,
    program        TEXT      NOT NULL,
    version_min    BIGINT    NOT NULL,
    version_max    BIGINT    NOT NULL,
    mode           TEXT      NOT NULL,
    os             TEXT      NOT NULL,
    arch           TEXT      NOT NULL,
    as_root        BOOLEAN   NOT NULL,
    applied_gen    BIGINT    NOT NULL,
    applied_n      BIGINT    NOT NULL,
    outbox         TEXT      NOT NULL,
    skew_seconds   DOUBLE PRECISION NOT NULL,
    not_after      TIMESTAMP,
    renew_after    TIMESTAMP,
    last_seen      TIMESTAMP,
    created_at     TIMESTAMP NOT NULL,
    removed_at     TIMESTAMP,
    version        BIGINT    NOT NULL
);
CREATE UNIQUE INDEX nodes_name ON nodes (tenant, name) WHERE removed_at IS NULL;

-- Who set which tag. The strongest source wins; hidden rows of the gateway
-- take a key away that a weaker source keeps setting.
CREATE TABLE node_tags (
    node_id  TEXT    NOT NULL REFERENCES nodes (id),
    key      TEXT    NOT NULL,
    source   TEXT    NOT NULL,
    value    TEXT    NOT NULL,
    hidden   BOOLEAN NOT NULL,
    PRIMARY KEY (node_id, key, source)
);

CREATE TABLE rcps (
    name          TEXT      NOT NULL PRIMARY KEY,
    party_id      TEXT      NOT NULL,
    address       TEXT      NOT NULL,
    public        TEXT      NOT NULL,
    via           TEXT      NOT NULL,
    source        TEXT      NOT NULL,
    state         TEXT      NOT NULL,
    state_reason  TEXT      NOT NULL,
    state_since   TIMESTAMP NOT NULL,
    key_hash      TEXT      NOT NULL,
    program       TEXT      NOT NULL,
    draining      BOOLEAN   NOT NULL,
    not_after     TIMESTAMP,
    renew_after   TIMESTAMP,
    last_seen     TIMESTAMP,
    created_at    TIMESTAMP NOT NULL,
    version       BIGINT    NOT NULL
);
CREATE UNIQUE INDEX rcps_party ON rcps (party_id) WHERE party_id <> '';

-- Every key that was ever certified, and the end of the trust in it.
CREATE TABLE keys (
    key_hash    TEXT      NOT NULL PRIMARY KEY,
    role        TEXT      NOT NULL,
    party_id    TEXT      NOT NULL,
    name        TEXT      NOT NULL,
    tenant      TEXT      NOT NULL,
    issued_at   TIMESTAMP NOT NULL,
    not_after   TIMESTAMP NOT NULL,
    revoked_at  TIMESTAMP,
    reason      TEXT      NOT NULL
);
CREATE INDEX keys_party ON keys (party_id);
CREATE INDEX keys_revoked ON keys (revoked_at) WHERE revoked_at IS NOT NULL;

CREATE TABLE joins (
    id            TEXT      NOT NULL PRIMARY KEY,
    role          TEXT      NOT NULL,
    tenant        TEXT      NOT NULL REFERENCES tenants (id),
    name          TEXT      NOT NULL,
    token_hash    TEXT      NOT NULL,
    trust_domain  TEXT      NOT NULL,
    tags          TEXT      NOT NULL,
    allow_tags    TEXT      NOT NULL,
    rcps          TEXT      NOT NULL,
    max_uses      BIGINT    NOT NULL,
    used          BIGINT    NOT NULL,
    manual        BOOLEAN   NOT NULL,
    replaces      BOOLEAN   NOT NULL,
    generation    BIGINT    NOT NULL,
    created_at    TIMESTAMP NOT NULL,
    created_by    TEXT      NOT NULL,
    expires_at    TIMESTAMP NOT NULL,
    revoked_at    TIMESTAMP
);

CREATE TABLE join_uses (
    join_id   TEXT      NOT NULL REFERENCES joins (id),
    key_hash  TEXT      NOT NULL,
    party_id  TEXT      NOT NULL,
    used_at   TIMESTAMP NOT NULL,
    PRIMARY KEY (join_id, key_hash)
);

CREATE TABLE requests (
    id            TEXT      NOT NULL PRIMARY KEY,
    role          TEXT      NOT NULL,
    party_id      TEXT      NOT NULL,
    key_hash      TEXT      NOT NULL,
    name          TEXT      NOT NULL,
    tenant        TEXT      NOT NULL REFERENCES tenants (id),
    source        TEXT      NOT NULL,
    rcp           TEXT      NOT NULL,
    tags          TEXT      NOT NULL,
    join_id       TEXT      NOT NULL,
    csr           BLOB      NOT NULL,
    program       TEXT      NOT NULL,
    state         TEXT      NOT NULL,
    reason        TEXT      NOT NULL,
    code          TEXT      NOT NULL,
    requested_at  TIMESTAMP NOT NULL,
    seen_at       TIMESTAMP NOT NULL,
    decided_at    TIMESTAMP,
    decided_by    TEXT      NOT NULL
);
CREATE INDEX requests_key ON requests (key_hash);
CREATE INDEX requests_time ON requests (requested_at);

-- The name of a policy and its current version; 0 when it was deleted.
CREATE TABLE policies (
    tenant   TEXT   NOT NULL REFERENCES tenants (id),
    name     TEXT   NOT NULL,
    current  BIGINT NOT NULL,
    last     BIGINT NOT NULL,
    PRIMARY KEY (tenant, name)
);

-- Versions never change.
CREATE TABLE policy_versions (
    tenant      TEXT      NOT NULL,
    name        TEXT      NOT NULL,
    version     BIGINT    NOT NULL,
    type        TEXT      NOT NULL,
    digest      TEXT      NOT NULL,
    spec        TEXT      NOT NULL,
    created_at  TIMESTAMP NOT NULL,
    created_by  TEXT      NOT NULL,
    PRIMARY KEY (tenant, name, version),
    FOREIGN KEY (tenant, name) REFERENCES policies (tenant, name)
);
CREATE INDEX policy_versions_digest ON policy_versions (digest);

CREATE TABLE deployments (
    tenant      TEXT      NOT NULL REFERENCES tenants (id),
    name        TEXT      NOT NULL,
    selector    TEXT      NOT NULL,
    policies    TEXT      NOT NULL,
    min_nodes   BIGINT    NOT NULL,
    max_nodes   BIGINT    NOT NULL,
    rollout     TEXT,
    revision    BIGINT    NOT NULL,
    created_at  TIMESTAMP NOT NULL,
    updated_at  TIMESTAMP NOT NULL,
    deleted_at  TIMESTAMP,
    PRIMARY KEY (tenant, name)
);

-- What each node should have. content is everything of the signed document
-- but revision, time and specs; digest is of content.
CREATE TABLE desired (
    node_id     TEXT      NOT NULL PRIMARY KEY REFERENCES nodes (id),
    generation  BIGINT    NOT NULL,
    n           BIGINT    NOT NULL,
    digest      TEXT      NOT NULL,
    content     TEXT      NOT NULL,
    changed_at  TIMESTAMP NOT NULL,
    refused     TEXT      NOT NULL,
    reason      TEXT      NOT NULL
);

-- What each node said became of each policy.
CREATE TABLE policy_status (
    node_id  TEXT      NOT NULL REFERENCES nodes (id),
    policy   TEXT      NOT NULL,
    type     TEXT      NOT NULL,
    digest   TEXT      NOT NULL,
    state    TEXT      NOT NULL,
    error    TEXT      NOT NULL,
    since    TIMESTAMP NOT NULL,
    PRIMARY KEY (node_id, policy)
);

CREATE TABLE actions (
    id          TEXT      NOT NULL PRIMARY KEY,
    seq         BIGINT    NOT NULL UNIQUE,
    batch       TEXT      NOT NULL,
    batch_key   TEXT      NOT NULL,
    tenant      TEXT      NOT NULL REFERENCES tenants (id),
    node_id     TEXT      NOT NULL REFERENCES nodes (id),
    node_name   TEXT      NOT NULL,
    command     TEXT      NOT NULL,
    ttl         BIGINT    NOT NULL,
    timeout     BIGINT    NOT NULL,
    state       TEXT      NOT NULL,
    code        TEXT      NOT NULL,
    reason      TEXT      NOT NULL,
    exit_code   BIGINT,
    signal      BIGINT    NOT NULL,
    truncated   BOOLEAN   NOT NULL,
    cancelling  BOOLEAN   NOT NULL,
    created_at  TIMESTAMP NOT NULL,
    created_by  TEXT      NOT NULL,
    expires_at  TIMESTAMP,
    sent_at     TIMESTAMP,
    started_at  TIMESTAMP,
    ended_at    TIMESTAMP
);
CREATE INDEX actions_batch ON actions (batch);
CREATE INDEX actions_node ON actions (node_id, seq);
CREATE INDEX actions_batch_key ON actions (batch_key) WHERE batch_key <> '';
CREATE INDEX actions_open ON actions (state) WHERE state IN ('queued', 'sent', 'running');

CREATE TABLE action_frames (
    action_id  TEXT   NOT NULL REFERENCES actions (id),
    n          BIGINT NOT NULL,
    stream     TEXT   NOT NULL,
    data       BLOB   NOT NULL,
    PRIMARY KEY (action_id, n)
);

-- One row per spool that a node ever had: ref stands in events for both.
CREATE TABLE spools (
    ref         INTEGER   NOT NULL PRIMARY KEY,
    node_id     TEXT      NOT NULL,
    spool       TEXT      NOT NULL,
    watermark   BIGINT    NOT NULL,
    dropped     BIGINT    NOT NULL,
    created_at  TIMESTAMP NOT NULL
);
CREATE UNIQUE INDEX spools_name ON spools (node_id, spool);

CREATE TABLE events (
    pos          INTEGER   NOT NULL PRIMARY KEY,
    id           TEXT      NOT NULL,
    spool_ref    BIGINT    NOT NULL,
    seq          BIGINT    NOT NULL,
    node_id      TEXT      NOT NULL,
    time         TIMESTAMP NOT NULL,
    received_at  TIMESTAMP NOT NULL,
    severity     TEXT      NOT NULL,
    application  TEXT      NOT NULL,
    object       TEXT      NOT NULL,
    key          TEXT      NOT NULL,
    text         TEXT      NOT NULL,
    instance     TEXT      NOT NULL,
    state        TEXT      NOT NULL,
    count        BIGINT    NOT NULL,
    merged_into  TEXT      NOT NULL,
    changed_at   TIMESTAMP,
    changed_by   TEXT      NOT NULL
);
CREATE UNIQUE INDEX events_id ON events (id);
CREATE UNIQUE INDEX events_place ON events (spool_ref, seq);
CREATE INDEX events_node ON events (node_id, pos);
CREATE INDEX events_key ON events (node_id, key) WHERE key <> '' AND state <> 'closed' AND merged_into = '';

CREATE TABLE annotations (
    pos       INTEGER   NOT NULL PRIMARY KEY,
    event_id  TEXT      NOT NULL,
    time      TIMESTAMP NOT NULL,
    by_whom   TEXT      NOT NULL,
    text      TEXT      NOT NULL
);
CREATE INDEX annotations_event ON annotations (event_id);

CREATE TABLE gaps (
    pos      INTEGER   NOT NULL PRIMARY KEY,
    node_id  TEXT      NOT NULL,
    spool    TEXT      NOT NULL,
    from_seq BIGINT    NOT NULL,
    to_seq   BIGINT    NOT NULL,
    reason   TEXT      NOT NULL,
    time     TIMESTAMP NOT NULL
);
CREATE UNIQUE INDEX gaps_place ON gaps (node_id, spool, from_seq, to_seq);

CREATE TABLE audit (
    pos      INTEGER   NOT NULL PRIMARY KEY,
    time     TIMESTAMP NOT NULL,
    who      TEXT      NOT NULL,
    origin   TEXT      NOT NULL,
    what     TEXT      NOT NULL,
    object   TEXT      NOT NULL,
    result   TEXT      NOT NULL,
    detail   TEXT      NOT NULL
);

CREATE TABLE tokens (
    id          TEXT      NOT NULL PRIMARY KEY,
    name        TEXT      NOT NULL,
    role        TEXT      NOT NULL,
    hash        TEXT      NOT NULL,
    created_at  TIMESTAMP NOT NULL,
    created_by  TEXT      NOT NULL,
    expires_at  TIMESTAMP NOT NULL,
    revoked_at  TIMESTAMP,
    last_used   TIMESTAMP
);
CREATE UNIQUE INDEX tokens_hash ON tokens (hash);
