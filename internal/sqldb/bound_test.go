package sqldb

import (
	"bytes"
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/uptrace/bun"
)

// everyKind has a column of each kind that models have.
type everyKind struct {
	bun.BaseModel `bun:"table:kinds"`
	ID            string `bun:",pk"`
	Text          string
	Number        int64
	Part          float64
	Yes           bool
	Time          time.Time
	Never         time.Time `bun:",nullzero"`
	Tags          map[string]string
	List          []string
	Blob          []byte
}

// TestBoundAsBun: a row that is bound is the row that bun writes into the text
// of a query, whatever stands in it; so is one whose columns are bound later.
func TestBoundAsBun(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "kinds.db"), `CREATE TABLE kinds (id TEXT PRIMARY KEY, text TEXT, number BIGINT, part DOUBLE, yes BOOLEAN,
		time TIMESTAMP, never TIMESTAMP, tags TEXT, list TEXT, blob BLOB);`)
	defer func() { _ = db.Close() }()
	insert, err := db.PrepareInsert(t.Context(), (*everyKind)(nil), `ON CONFLICT (id) DO UPDATE SET text = "every_kind".text || EXCLUDED.text`)
	if err != nil {
		t.Fatal(err)
	}
	update, err := db.PrepareUpdate(t.Context(), (*everyKind)(nil), "blob", "list", "tags", "never", "time", "yes", "part", "number", "text")
	if err != nil {
		t.Fatal(err)
	}
	some, err := db.Prepare(t.Context(), `UPDATE kinds SET text = ?, number = ?, part = ?, time = ? WHERE id = ?`)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 2, 3, 4, 5, 6, 789_000, time.FixedZone("", 3600))
	rows := []everyKind{
		{},
		{Text: "it's 'quoted', \"twice\", \n on two lines ? ?1 :a -- no comment", Number: -1 << 62, Part: 0.1, Yes: true, Time: at, Never: at,
			Tags: map[string]string{"a'b": "ü"}, List: []string{"'", "NULL"}, Blob: []byte{0, 1, 0xff}},
		{Text: "NULL", Time: at.UTC(), Tags: map[string]string{}, List: []string{}, Blob: []byte{}},
		{Text: "''", Part: 1e300}, {Text: "a\x00b", Part: -3}, {Text: "12"}, {Text: "x'00'"},
	}
	dump := func(tx bun.Tx, id string) string {
		var b strings.Builder
		found, err := tx.Tx.QueryContext(t.Context(), `SELECT id || '|' || typeof(text) || quote(text) || typeof(number) || quote(number) || typeof(part) || quote(part) || typeof(yes) || quote(yes)
			|| typeof(time) || quote(time) || typeof(never) || quote(never) || typeof(tags) || quote(tags) || typeof(list) || quote(list) || typeof(blob) || quote(blob) FROM kinds WHERE id = ?`, id)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = found.Close() }()
		for found.Next() {
			var line []byte
			if err := found.Scan(&line); err != nil {
				t.Fatal(err)
			}
			b.Write(bytes.TrimPrefix(line, []byte(id)))
		}
		if err := found.Err(); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	err = db.Write(t.Context(), func(ctx context.Context, tx bun.Tx) error {
		for i := range rows {
			bound, written := rows[i], rows[i]
			bound.ID, written.ID = "bound", "written"
			if _, err := insert.Exec(ctx, tx, &bound); err != nil {
				return err
			}
			if _, err := tx.NewInsert().Model(&written).Exec(ctx); err != nil {
				return err
			}
			if got, want := dump(tx, "bound"), dump(tx, "written"); got != want || !strings.HasPrefix(got, "|") {
				t.Errorf("row %d is bound as\n%s\nand written as\n%s", i, got, want)
			}
			if _, err := insert.Exec(ctx, tx, &everyKind{ID: "updated", Text: "old", Tags: map[string]string{"old": ""}}); err != nil {
				return err
			}
			updated := rows[i]
			updated.ID = "updated"
			if _, err := update.Exec(ctx, tx, &updated); err != nil {
				return err
			}
			if got, want := dump(tx, "updated"), dump(tx, "written"); got != want {
				t.Errorf("row %d is updated to\n%s\nand written as\n%s", i, got, want)
			}
			want := dump(tx, "written")
			if _, err := tx.Tx.ExecContext(ctx, "UPDATE kinds SET text = 'other', number = 7, part = 7, time = 'then' WHERE id = 'written'"); err != nil {
				return err
			}
			if _, err := some.Exec(ctx, tx, rows[i].Text, rows[i].Number, rows[i].Part, rows[i].Time, "written"); err != nil {
				return err
			}
			if got := dump(tx, "written"); got != want {
				t.Errorf("the values of row %d are bound as\n%s\nand written as\n%s", i, got, want)
			}
			if _, err := tx.Tx.ExecContext(ctx, "DELETE FROM kinds"); err != nil {
				return err
			}
		}
		for range 2 {
			if _, err := insert.Exec(ctx, tx, &everyKind{ID: "twice", Text: "ab"}); err != nil {
				return err
			}
		}
		if got := dump(tx, "twice"); !strings.HasPrefix(got, "|text'abab'") {
			t.Errorf("a conflict made %s", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := insert.Exec(t.Context(), db.Read(), &everyKind{}); err == nil {
		t.Error("a row was inserted without a transaction")
	}
	if _, err := db.PrepareUpdate(t.Context(), (*everyKind)(nil), "no_such"); err == nil {
		t.Error("an update of no column was prepared")
	}
}
