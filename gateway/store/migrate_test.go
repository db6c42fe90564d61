package store

import (
	"database/sql"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"sallyport/internal/sqldb"
)

// oldest makes a database as the first version of the program had it, with a row
// in every table: each text in it is the same, so that all references lead
// somewhere.
func oldest(t *testing.T, path string) {
	t.Helper()
	base, err := migrations.ReadFile("migrations/sqlite/00001_base.sql")
	if err != nil {
		t.Fatal(err)
	}
	made, err := sqldb.Open(ctx, sqldb.Config{Path: path, Migrations: fstest.MapFS{"00001_base.sql": {Data: base}}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := made.Close(); err != nil {
		t.Fatal(err)
	}
	db := must[*sql.DB](t)(sql.Open("sqlite", path))
	defer func() { _ = db.Close() }()
	for _, table := range tables(t, db) {
		var names, values []string
		for column, kind := range columns(t, db, table) {
			value := map[string]string{"TEXT": "'x'", "BLOB": "x'00ff'", "TIMESTAMP": "'2026-01-02 03:04:05+00:00'"}[kind]
			if value == "" {
				value = "1" // the numbers
			}
			names, values = append(names, column), append(values, value)
		}
		if _, err := db.ExecContext(ctx, fmt.Sprintf("INSERT INTO %s (%s) VALUES (%s)", table, strings.Join(names, ", "), strings.Join(values, ", "))); err != nil {
			t.Fatalf("%s: %v", table, err)
		}
	}
}

// tables lists ours.
func tables(t *testing.T, db *sql.DB) (names []string) {
	t.Helper()
	rows := must[*sql.Rows](t)(db.QueryContext(ctx, "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' AND name NOT LIKE 'goose_%' ORDER BY name"))
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return names
}

// columns are a table's, with their types.
func columns(t *testing.T, db *sql.DB, table string) map[string]string {
	t.Helper()
	rows := must[*sql.Rows](t)(db.QueryContext(ctx, "SELECT name, type FROM pragma_table_info(?)", table))
	defer func() { _ = rows.Close() }()
	all := map[string]string{}
	for rows.Next() {
		var name, kind string
		if err := rows.Scan(&name, &kind); err != nil {
			t.Fatal(err)
		}
		all[name] = kind
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

// content is what stands in the columns of every table, as text.
func content(t *testing.T, path string, of map[string][]string) map[string]string {
	t.Helper()
	db := must[*sql.DB](t)(sql.Open("sqlite", path))
	defer func() { _ = db.Close() }()
	all := map[string]string{}
	for table, names := range of {
		var text string
		query := fmt.Sprintf("SELECT group_concat(quote(%s), ' ') FROM %s", strings.Join(names, ") || quote("), table)
		if err := db.QueryRowContext(ctx, query).Scan(&text); err != nil {
			t.Fatalf("%s: %v", table, err)
		}
		all[table] = text
	}
	return all
}

// An upgrade takes over every row of every table as it is, from the first
// version on.
func TestMigrationsKeepEverything(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sallyport.db")
	oldest(t, path)
	db := must[*sql.DB](t)(sql.Open("sqlite", path))
	of := map[string][]string{}
	for _, table := range tables(t, db) {
		of[table] = slices.Sorted(maps.Keys(columns(t, db, table)))
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if len(of) < 20 {
		t.Fatalf("%d tables", len(of))
	}
	before := content(t, path, of)

	if err := open(t, path).Close(); err != nil {
		t.Fatal(err)
	}
	for table, text := range content(t, path, of) {
		if text != before[table] {
			t.Errorf("%s held %s, and holds %s", table, before[table], text)
		}
	}
}
