-- +goose Up

-- Rules by which certificate requests are granted without an operator. spec is
-- JSON; granted counts what a rule let in.
CREATE TABLE rules (
    tenant      TEXT      NOT NULL REFERENCES tenants (id),
    name        TEXT      NOT NULL,
    spec        TEXT      NOT NULL,
    granted     BIGINT    NOT NULL,
    granted_at  TIMESTAMP,
    created_at  TIMESTAMP NOT NULL,
    created_by  TEXT      NOT NULL,
    updated_at  TIMESTAMP NOT NULL,
    updated_by  TEXT      NOT NULL,
    PRIMARY KEY (tenant, name)
);

-- The rule that granted a request; empty: an operator, or a token alone.
ALTER TABLE requests ADD COLUMN rule TEXT NOT NULL DEFAULT '';

-- How far an RCP's clock is ahead of the gateway's, as its last hello showed.
ALTER TABLE rcps ADD COLUMN skew_seconds DOUBLE PRECISION NOT NULL DEFAULT 0;

-- What waits is looked for by name and counted by RCP, among all that ever was.
CREATE INDEX requests_waiting_name ON requests (name) WHERE state = 'pending';
CREATE INDEX requests_waiting_rcp ON requests (rcp, seen_at) WHERE state = 'pending';
