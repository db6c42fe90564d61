package sqldb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/uptrace/bun"
)

// Prepared is a query that SQLite parses once for each connection. Bun writes
// values into the text of a query, which is then another one each time; for a
// row that is found by its key, parsing is most of what it costs.
type Prepared struct {
	read, write *sql.Stmt
	db          *DB
}

// Exec changes rows in a transaction, the one that by is.
func (p *Prepared) Exec(ctx context.Context, by bun.IDB, args ...any) (sql.Result, error) {
	tx, ok := by.(bun.Tx)
	if !ok {
		return nil, fmt.Errorf("rows are changed in a transaction, not in %T", by)
	}
	return tx.StmtContext(ctx, p.write).ExecContext(ctx, p.db.clean(args)...)
}

// Prepare parses a query whose values are bound in place of "?". No transaction
// may be open: it needs the writing connection.
func (db *DB) Prepare(ctx context.Context, text string) (*Prepared, error) {
	w, err := db.write.DB.PrepareContext(ctx, text)
	if err != nil {
		return nil, fmt.Errorf("prepare %q: %w", text, err)
	}
	r, err := db.read.DB.PrepareContext(ctx, text)
	if err != nil {
		return nil, fmt.Errorf("prepare %q: %w", text, errors.Join(err, w.Close()))
	}
	return &Prepared{read: r, write: w, db: db}, nil
}

// Select reads rows into dest, a pointer to a slice of models, by the
// connection of a transaction or by one of the readers.
func (p *Prepared) Select(ctx context.Context, by bun.IDB, dest any, args ...any) error {
	stmt := p.read
	if tx, ok := by.(bun.Tx); ok {
		stmt = tx.StmtContext(ctx, p.write)
	}
	// A context that can end costs two goroutines, which wait for that, and a
	// row that is found by its key is there sooner.
	ctx = context.WithoutCancel(ctx)
	rows, err := stmt.QueryContext(ctx, p.db.clean(args)...)
	if err != nil {
		return err
	}
	return p.db.read.ScanRows(ctx, rows, dest) // which closes them
}

// clean makes of args what [dialect] would write into a text for them.
func (db *DB) clean(args []any) []any {
	for n, arg := range args {
		if t, ok := arg.(time.Time); ok {
			args[n] = strings.Trim(string(db.write.Dialect().AppendTime(nil, t)), "'")
		} else if v := reflect.ValueOf(arg); v.Kind() == reflect.String {
			args[n] = Clean(v.String())
		}
	}
	return args
}
