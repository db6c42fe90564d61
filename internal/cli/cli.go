// Package cli is what the three programs share as commands: exit codes, output
// as table, JSON or CSV, confirmation, progress, the `local` verbs that speak
// to a role on this host, and running a role until a signal.
//
// It knows no role: the mains hand in what to run.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"sallyport/config"
)

// IO is the outside of one program: a test hands in buffers.
type IO struct {
	In       io.Reader
	Out, Err io.Writer
	Env      []string // as os.Environ
}

// Standard is the process's own.
func Standard() IO {
	return IO{In: newInput(os.Stdin), Out: os.Stdout, Err: os.Stderr, Env: os.Environ()}
}

// input is a file whose reads end with the first signal: whoever presses
// Ctrl-C at a question has answered it.
type input struct {
	file        *os.File
	once        sync.Once
	interrupted chan struct{}
}

func newInput(f *os.File) *input { return &input{file: f, interrupted: make(chan struct{})} }

// Fd is the file descriptor below.
func (i *input) Fd() uintptr { return i.file.Fd() }

func (i *input) interrupt() { i.once.Do(func() { close(i.interrupted) }) }

// Read leaves a read that was interrupted to itself: nobody wants its bytes.
func (i *input) Read(b []byte) (int, error) {
	own, err := await(i, func() ([]byte, error) {
		own := make([]byte, len(b))
		n, err := i.file.Read(own)
		return own[:n], err
	})
	return copy(b, own), err
}

// await returns what read does, or errSignal with the first signal.
func await(i *input, read func() ([]byte, error)) ([]byte, error) {
	select {
	case <-i.interrupted: // before: nothing is read, or switched off for it
		return nil, errSignal
	default:
	}
	type result struct {
		b   []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		b, err := read()
		done <- result{b, err}
	}()
	select {
	case r := <-done:
		return r.b, r.err
	case <-i.interrupted:
		return nil, errSignal
	}
}

// terminal returns the file descriptor behind one of the streams when a person
// sits there.
func terminal(stream any) (fd int, ok bool) {
	f, isFile := stream.(interface{ Fd() uintptr })
	if !isFile {
		return 0, false
	}
	fd = int(f.Fd())
	return fd, term.IsTerminal(fd)
}

// errSignal is the cause of a context that a signal ended.
var errSignal = errors.New("interrupted")

// Interrupted reports whether a signal ended ctx.
func Interrupted(ctx context.Context) bool { return errors.Is(context.Cause(ctx), errSignal) }

// Main runs a program and returns its exit code. The first SIGINT or SIGTERM
// ends the context, and the program finishes what it must; the second ends the
// process at once.
func Main(root *cobra.Command, streams IO, args []string) int {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	done := make(chan struct{})
	defer close(done)
	defer signal.Stop(signals)
	go func() {
		for n := 0; ; n++ {
			select {
			case s := <-signals:
				if n > 0 {
					os.Exit(128 + int(s.(syscall.Signal)))
				}
				cancel(errSignal)
				if in, ok := streams.In.(*input); ok {
					in.interrupt()
				}
			case <-done:
				return
			}
		}
	}()
	return Execute(ctx, root, streams, args)
}

// Execute runs one command line, prints its error and returns the exit code.
func Execute(ctx context.Context, root *cobra.Command, streams IO, args []string) int {
	root.SetIn(streams.In)
	root.SetOut(streams.Out)
	root.SetErr(streams.Err)
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return ExitOK
	}
	report(streams.Err, cmd, err)
	return Code(err)
}

// report prints an error once; each line of a joined one on a line of its own.
func report(w io.Writer, cmd *cobra.Command, err error) {
	text := err.Error()
	if text == "" { // an exit code that says it all, such as that of an action
		return
	}
	name := cmd.Root().Name()
	for line := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n") {
		_, _ = fmt.Fprintf(w, "%s: %s\n", name, Clean(line)) // an error may quote a node, or an RCP
	}
	if _, ok := errors.AsType[*usageError](err); ok {
		_, _ = fmt.Fprintf(w, "%s: run `%s --help` for its use\n", name, cmd.CommandPath())
	}
}

// NewLogger writes log lines to w as the configuration says.
func NewLogger(w io.Writer, c config.Common) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.LogLevel}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}
