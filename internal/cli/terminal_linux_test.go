package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// openTerminal returns both ends of a terminal: what a person has, and what a
// program has.
func openTerminal(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = program.Close() })
	return person, program
}

// interrupted runs do, which asks, and sends what a signal sends once it does.
func interrupted(t *testing.T, in *input, asks func() bool, do func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- do() }()
	for !asks() {
		select {
		case err := <-done:
			return err
		case <-time.After(time.Millisecond):
		}
	}
	in.interrupt()
	select {
	case err := <-done:
		return err
	case <-time.After(10 * time.Second):
		t.Fatal("it still waits for an answer")
		return nil
	}
}

func atOnce() bool { return true }

func TestSignalEndsQuestions(t *testing.T) {
	t.Run("confirm", func(t *testing.T) {
		_, program := openTerminal(t)
		in := newInput(program)
		err := interrupted(t, in, atOnce, func() error {
			return Confirm(IO{In: in, Out: io.Discard, Err: program}, false, "revoke %d nodes", 12)
		})
		if Code(err) != ExitRefused {
			t.Errorf("got %v, want a refusal", err)
		}
	})
	t.Run("passphrase", func(t *testing.T) {
		_, program := openTerminal(t)
		in := newInput(program)
		before, err := term.GetState(int(program.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		silent := func() bool {
			now, err := term.GetState(int(program.Fd()))
			return err == nil && *now != *before
		}
		err = interrupted(t, in, silent, func() error {
			_, err := Passphrase(IO{In: in, Out: io.Discard, Err: io.Discard}, "", "SALLYPORT_X", true)
			return err
		})
		if !errors.Is(err, errSignal) {
			t.Errorf("got %v, want %v", err, errSignal)
		}
		if after, err := term.GetState(int(program.Fd())); err != nil || *after != *before {
			t.Errorf("the terminal is left as %v, it was %v (%v)", after, before, err)
		}
	})
	t.Run("document", func(t *testing.T) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = errors.Join(r.Close(), w.Close()) }()
		in := newInput(r)
		err = interrupted(t, in, atOnce, func() error {
			_, err := io.ReadAll(in)
			return err
		})
		if !errors.Is(err, errSignal) {
			t.Errorf("got %v, want %v", err, errSignal)
		}
	})
}

func TestInputReadsAll(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("sallyport\n"), 50_000)
	go func() {
		_, _ = w.Write(want)
		_ = w.Close()
	}()
	got, err := io.ReadAll(newInput(r))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes of %d: %v", len(got), len(want), err)
	}
}

// shown is what a table looks like on a terminal of that width.
func shown(t *testing.T, width uint16, table Table) string {
	t.Helper()
	person, program := openTerminal(t)
	if err := unix.IoctlSetWinsize(int(program.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: width}); err != nil {
		t.Fatal(err)
	}
	o := NewOutput(IO{Out: program, Err: io.Discard})
	if err := o.Print(nil, table); err != nil {
		t.Fatal(err)
	}
	const end = "that was all"
	if _, err := program.WriteString(end); err != nil {
		t.Fatal(err)
	}
	var text []byte
	for { // a read has what has come so far
		b := make([]byte, 64<<10)
		n, err := person.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		text = append(text, b[:n]...)
		if all, ok := bytes.CutSuffix(text, []byte(end)); ok {
			return string(all)
		}
	}
}

func TestNarrowTerminal(t *testing.T) {
	const fingerprint = "SHA256:06YV5cAs40H0vngVSj9phsg3x0uE3TcT/AuKy8Zyi5A="
	reason := strings.Repeat("a long story ", 20)
	table := Table{Columns: []string{"id", "fingerprint", "reason", "rcp"}}
	table.Add("7db1cd6f-aa9c-436d-ab55-88f062a5895f", fingerprint, reason, "dmz-1")
	table.Add("6323e660-8675-4996-9a14-2455a26c6abf", fingerprint, "", "dmz-2")
	for _, width := range []uint16{40, 80, 130, 160} {
		text := shown(t, width, table)
		for _, w := range []string{"7db1cd6f-aa9c-436d-ab55-88f062a5895f", "6323e660-8675-4996-9a14-2455a26c6abf", fingerprint, "FINGERPRINT", "dmz-2", "a long story", "…"} {
			if !strings.Contains(text, w) {
				t.Errorf("%d columns: %q is missing in\n%s", width, w, text)
			}
		}
		if strings.Contains(text, " \r\n") {
			t.Errorf("%d columns: a line ends in blanks, which wrap:\n%q", width, text)
		}
	}
	if text := shown(t, 600, table); !strings.Contains(text, strings.TrimSpace(reason)) {
		t.Errorf("600 columns are enough for all of it:\n%s", text)
	}
	if table.Rows[0][2] != reason {
		t.Error("the caller's table was cut")
	}
}

// TestProgress: a bar shows how far it is, also where the total is known later, and
// leaves nothing behind.
func TestProgress(t *testing.T) {
	person, program := openTerminal(t)
	if err := unix.IoctlSetWinsize(int(program.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: 100}); err != nil {
		t.Fatal(err)
	}
	came := make(chan []byte)
	go func() {
		for {
			b := make([]byte, 4096)
			n, err := person.Read(b)
			if err != nil {
				return
			}
			select {
			case came <- b[:n]:
			case <-t.Context().Done():
				return
			}
		}
	}()
	var text []byte
	until := func(want string) {
		t.Helper()
		for !bytes.Contains(text, []byte(want)) {
			select {
			case b := <-came:
				text = append(text, b...)
			case <-time.After(10 * time.Second):
				t.Fatalf("no %q in %q", want, text)
			}
		}
	}
	streams := IO{Out: io.Discard, Err: program}
	bar := NewProgress(streams, "nodes", 1)
	bar.Set(5, 12)
	until("nodes 5/12")
	bar.Set(12, 12)
	until("nodes 12/12")
	bar.Done()
	bar = NewProgressBytes(streams, "backup")
	bar.SetBytes(3<<19, 3<<20)
	until("backup 1.5 MiB/3.0 MiB")
	bar.Done()
	const clearLine = "\x1b[J"
	if _, err := program.WriteString("the end"); err != nil {
		t.Fatal(err)
	}
	until("the end")
	if last := bytes.LastIndex(text, []byte(clearLine)); last < 0 || bytes.Contains(text[last:], []byte("MiB")) {
		t.Errorf("the bar is still there: %q", text)
	}
}
