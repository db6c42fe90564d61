-- +goose Up

-- TCP listeners of the gateway, each of which leads to a target. An empty
-- node_id means any node that offers it.
CREATE TABLE forwards (
    listen      TEXT      NOT NULL PRIMARY KEY,
    tenant      TEXT      NOT NULL REFERENCES tenants (id),
    target      TEXT      NOT NULL,
    node_id     TEXT      NOT NULL,
    created_at  TIMESTAMP NOT NULL,
    created_by  TEXT      NOT NULL
);

-- The catalog of targets reads what is new of the desired states, and all that
-- nodes said of their targets.
CREATE INDEX desired_n ON desired (n);
CREATE INDEX policy_status_targets ON policy_status (policy) WHERE type = 'target';
