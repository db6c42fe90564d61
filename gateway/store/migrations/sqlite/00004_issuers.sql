-- +goose Up

-- What each party has of the certificate authority: the key hash of the
-- intermediate that issued its leaf, and the number of the trust document that
-- it holds. A party without a row has what there was before the first rollover.
CREATE TABLE party_trust (
    party_id    TEXT      NOT NULL PRIMARY KEY,
    role        TEXT      NOT NULL,
    issuer      TEXT      NOT NULL,
    trust       BIGINT    NOT NULL,
    changed_at  TIMESTAMP NOT NULL
);

-- The key hash of the root that a join code pins; empty: the first one.
ALTER TABLE joins ADD COLUMN root TEXT NOT NULL DEFAULT '';
