-- +goose Up

-- Which of several databases that came from one backup goes on. reign is
-- random, made with each restoration; restored_at is when that was. A gateway
-- that has seen proof of a newer generation than its own writes down which, and
-- does not start again.
ALTER TABLE installation ADD COLUMN restored_at TIMESTAMP;
ALTER TABLE installation ADD COLUMN reign TEXT NOT NULL DEFAULT '';
ALTER TABLE installation ADD COLUMN superseded_by BIGINT NOT NULL DEFAULT 0;
ALTER TABLE installation ADD COLUMN superseded_at TIMESTAMP;
ALTER TABLE installation ADD COLUMN superseded_why TEXT NOT NULL DEFAULT '';
