package main

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/cli"
)

// The doctor of a gateway that another one has superseded does not say to start it,
// which would end it again, and leaves the database as it is.
func TestDoctorOfASupersededGateway(t *testing.T) {
	data := t.TempDir()
	dir := filepath.Join(data, "gateway")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	says := func() string {
		streams := cli.IO{Env: []string{"SALLYPORT_DATA=" + data}}
		var out, errs strings.Builder
		streams.In, streams.Out, streams.Err = strings.NewReader(""), &out, &errs
		if code := cli.Execute(t.Context(), newRoot(streams), streams, []string{"local", "--role", "gateway", "doctor"}); code != cli.ExitFailed {
			t.Errorf("exit code %d: %s", code, &errs)
		}
		return out.String()
	}
	open := func(then func(*store.DB) error) {
		db, err := store.Open(t.Context(), store.Config{Path: filepath.Join(dir, "sallyport.db"), Log: slog.New(slog.DiscardHandler), Bus: &bus.Local{}})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(then(db), db.Close()); err != nil {
			t.Fatal(err)
		}
	}
	open(func(*store.DB) error { return nil })
	if got := says(); !strings.Contains(got, "start it (`sallyport run gateway`)") {
		t.Errorf("of one that was stopped it says %s", got)
	}
	open(func(db *store.DB) error { return db.Supersede(t.Context(), 7, "test") })
	before := names(t, dir)
	got := says()
	for _, want := range []string{"superseded", "generation 7 is in use", "since 20", "if that is the one to keep, remove this one", "sallyport restore FILE"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in %s", want, got)
		}
	}
	if strings.Contains(got, "start it (`") {
		t.Errorf("it says to start it: %s", got)
	}
	if after := names(t, dir); !slices.Equal(after, before) {
		t.Errorf("beside it there were %v, and are %v", before, after)
	}
}

func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}
