-- +goose Up

-- The API token that a forward was made with: it ends with that. Empty: it was made
-- over the unix socket.
ALTER TABLE forwards ADD COLUMN token_id TEXT NOT NULL DEFAULT '';
