package sqldb

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"github.com/uptrace/bun"
	"github.com/uptrace/bun/schema"
)

// Bound writes rows of one model by a statement that SQLite parses once.
type Bound struct {
	stmt   *sql.Stmt
	model  reflect.Type
	fields []*schema.Field // in the order of the statement's values
	gen    schema.QueryGen
}

// PrepareInsert parses the insert of a row of a model, nil or not. What
// onConflict says follows the values, and names the model's own row by its bun
// alias. No transaction may be open: it needs the writing connection.
func (db *DB) PrepareInsert(ctx context.Context, model any, onConflict string) (*Bound, error) {
	typ := reflect.TypeOf(model).Elem()
	table := db.write.Table(typ)
	names, marks := make([]string, len(table.Fields)), make([]string, len(table.Fields))
	for i, f := range table.Fields {
		if f.SQLDefault != "" || f.AutoIncrement {
			return nil, fmt.Errorf("prepare insert of %s: column %s has a value of its own", typ, f.Name)
		}
		names[i], marks[i] = string(f.SQLName), "?"
	}
	return db.bind(ctx, typ, table.Fields, "INSERT INTO", string(table.SQLName), "AS", string(table.SQLAlias),
		"(", strings.Join(names, ", "), ") VALUES (", strings.Join(marks, ", "), ")", onConflict)
}

// PrepareUpdate parses the update of some columns of one row, that of a model's
// primary key.
func (db *DB) PrepareUpdate(ctx context.Context, model any, columns ...string) (*Bound, error) {
	typ := reflect.TypeOf(model).Elem()
	table := db.write.Table(typ)
	if len(table.PKs) == 0 || len(columns) == 0 {
		return nil, fmt.Errorf("prepare update of %s: it needs a primary key and columns", typ)
	}
	sets, fields := make([]string, len(columns)), make([]*schema.Field, len(columns))
	for i, name := range columns {
		f, err := table.Field(name)
		if err != nil {
			return nil, fmt.Errorf("prepare update of %s: %w", typ, err)
		}
		sets[i], fields[i] = string(f.SQLName)+" = ?", f
	}
	keys := make([]string, len(table.PKs))
	for i, f := range table.PKs {
		keys[i] = string(f.SQLName) + " = ?"
	}
	return db.bind(ctx, typ, append(fields, table.PKs...), "UPDATE", string(table.SQLName), "SET", strings.Join(sets, ", "), "WHERE", strings.Join(keys, " AND "))
}

func (db *DB) bind(ctx context.Context, model reflect.Type, fields []*schema.Field, words ...string) (*Bound, error) {
	text := strings.Join(words, " ")
	stmt, err := db.write.DB.PrepareContext(ctx, text)
	if err != nil {
		return nil, fmt.Errorf("prepare %q: %w", text, err)
	}
	return &Bound{stmt: stmt, model: model, fields: fields, gen: db.write.QueryGen()}, nil
}

// Exec writes a row, a pointer to the model, in a transaction.
func (w *Bound) Exec(ctx context.Context, tx bun.IDB, row any) (sql.Result, error) {
	t, ok := tx.(bun.Tx)
	if !ok {
		return nil, fmt.Errorf("write a %s: rows are written in a transaction, not in %T", w.model, tx)
	}
	v := reflect.ValueOf(row).Elem()
	if v.Type() != w.model {
		return nil, fmt.Errorf("write a %s: the row is a %s", w.model, v.Type())
	}
	args := make([]any, len(w.fields))
	var text []byte
	for n, f := range w.fields {
		var err error
		text = f.AppendValue(w.gen, text[:0], v)
		if args[n], err = bindable(text); err != nil {
			return nil, fmt.Errorf("write a %s: column %s: %w", w.model, f.Name, err)
		}
	}
	return t.StmtContext(ctx, w.stmt).ExecContext(ctx, args...)
}

var errNoLiteral = errors.New("not a literal that can be bound")

// bindable turns a literal, as bun writes it into a query, into the value that
// it stands for, so that a bound column holds what a written one would.
func bindable(lit []byte) (any, error) {
	switch s := string(lit); {
	case s == "NULL":
		return nil, nil
	case strings.EqualFold(s, "TRUE"):
		return int64(1), nil
	case strings.EqualFold(s, "FALSE"):
		return int64(0), nil
	case len(s) >= 2 && s[0] == '\'' && s[len(s)-1] == '\'':
		return strings.ReplaceAll(s[1:len(s)-1], "''", "'"), nil
	case len(s) >= 3 && (s[0] == 'X' || s[0] == 'x') && s[1] == '\'' && s[len(s)-1] == '\'':
		return hex.DecodeString(s[2 : len(s)-1])
	default:
		if n, err := strconv.ParseInt(s, 10, 64); err == nil {
			return n, nil
		}
		if f, err := strconv.ParseFloat(s, 64); err == nil {
			return f, nil
		}
		return nil, fmt.Errorf("%w: %.40q", errNoLiteral, s)
	}
}
