package node

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"sallyport/internal/atomicfile"
	"sallyport/internal/wire"
	"sallyport/node/proc"
)

// maxFrameData is the most output in one frame, in bytes.
const maxFrameData = 32 << 10

// A run's directory holds
//
//	action.json    the request: there before the process starts
//	frames         NDJSON of wire.ActionFrame, as it was sent
//	result.json    how it ended; without it after a restart the run is lost
//	collected      empty: a gateway has read it to the end
const (
	fileAction    = "action.json"
	fileFrames    = "frames"
	fileResult    = "result.json"
	fileCollected = "collected"
)

// run is one action on this node. Its frames are in a file, so that output
// costs disk, not memory, and a gateway can come back for them.
type run struct {
	action wire.Action
	dir    string
	limit  int64 // bytes of output that are kept
	cancel context.CancelCauseFunc

	mu        sync.Mutex
	frames    *os.File // nil once it has ended
	n         int64
	bytes     int64
	size      int64 // of the frames file
	truncated bool
	result    *wire.ActionResult
	ended     time.Time
	collected bool
	more      chan struct{} // closed at the next frame or the end
}

var errCancelled = errors.New("cancelled by an operator")
var errTimeout = errors.New("the time limit is over")

// write appends one frame of output; what is above the limit is dropped.
func (r *run) write(stream string, b []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(b) > 0 {
		part := b[:min(len(b), maxFrameData)]
		b = b[len(part):]
		if r.bytes+int64(len(part)) > r.limit {
			part = part[:r.limit-r.bytes]
			r.truncated, b = true, nil
		}
		if len(part) == 0 {
			return nil
		}
		line, err := wire.AppendLine(nil, wire.ActionFrame{N: r.n + 1, Stream: stream, Data: part})
		if err != nil {
			return err
		}
		if _, err := r.frames.WriteAt(line, r.size); err != nil {
			r.truncated = true // a full disk: the program goes on, its output does not
			return nil
		}
		r.n++
		r.bytes += int64(len(part))
		r.size += int64(len(line))
		r.wake()
	}
	return nil
}

func (r *run) wake() {
	if r.more != nil {
		close(r.more)
		r.more = nil
	}
}

// stream is one of a program's outputs.
type stream struct {
	r    *run
	name string
}

func (s stream) Write(b []byte) (int, error) {
	return len(b), s.r.write(s.name, b)
}

// execute runs the program to its end and writes the result.
func (r *run) execute(ctx context.Context, path string) {
	if r.action.Timeout > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, r.action.Timeout, errTimeout)
		defer stop()
	}
	res := wire.ActionResult{Started: time.Now().UTC()}
	exit, err := proc.Run(ctx, proc.Command{Path: path, Args: r.action.Command, Stdout: stream{r, "stdout"}, Stderr: stream{r, "stderr"}})
	res.Ended = time.Now().UTC()
	res.ExitCode, res.Signal = exit.Code, exit.Signal
	cause := context.Cause(ctx)
	switch {
	case err != nil:
		res.State, res.ExitCode, res.Started = wire.ActionFailed, 126, time.Time{}
		res.Reason = fmt.Sprintf("the program did not start: %v", err)
	case errors.Is(cause, errTimeout):
		res.State, res.Reason = wire.ActionTimedOut, fmt.Sprintf("it ran longer than %v", r.action.Timeout)
	case errors.Is(cause, errCancelled):
		res.State, res.Reason = wire.ActionCancelled, cause.Error()
	case cause != nil:
		res.State, res.Reason = wire.ActionLost, "the agent was stopped while it ran"
	case exit.Code == 0:
		res.State = wire.ActionSucceeded
	case exit.Signal != 0:
		res.State, res.Reason = wire.ActionFailed, fmt.Sprintf("ended by signal %d", exit.Signal)
	default:
		res.State, res.Reason = wire.ActionFailed, fmt.Sprintf("exit status %d", exit.Code)
	}
	r.end(res)
}

// end makes a result final. It stays in memory even when the disk refuses it.
func (r *run) end(res wire.ActionResult) {
	r.mu.Lock()
	defer r.mu.Unlock()
	res.Truncated = res.Truncated || r.truncated
	if res.Ended.IsZero() { // it was not run, or nobody saw its end: it is kept from now on
		res.Ended = time.Now().UTC()
	}
	if err := atomicfile.WriteJSON(filepath.Join(r.dir, fileResult), res); err != nil {
		res.Reason = firstOf(res.Reason, "") + fmt.Sprintf(" (the result is not on disk: %v)", err)
	}
	r.result, r.ended = &res, time.Now()
	if r.frames != nil {
		_ = r.frames.Close() // the result does not depend on it
		r.frames = nil
	}
	r.wake()
}

// replay writes the frames after n, and what follows, up to the result, and
// that the run goes on when there is nothing for a while. flush is called when
// there is nothing more for the moment.
func (r *run) replay(ctx context.Context, after int64, w io.Writer, flush func()) error {
	f, err := os.Open(filepath.Join(r.dir, fileFrames))
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	in := bufio.NewReaderSize(f, 64<<10)
	var done, sent int64
	alive := time.NewTicker(wire.ActionAlive)
	defer alive.Stop()
	for {
		r.mu.Lock()
		size, n, result := r.size, r.n, r.result
		var more chan struct{}
		if done == size && result == nil {
			if r.more == nil {
				r.more = make(chan struct{})
			}
			more = r.more
		}
		r.mu.Unlock()
		for done < size { // whole lines only: size is moved after they are written
			line, err := in.ReadBytes('\n')
			if err != nil {
				return err
			}
			done += int64(len(line))
			if sent++; sent > after {
				if _, err := w.Write(line); err != nil {
					return err
				}
			}
		}
		if result != nil {
			line, err := wire.AppendLine(nil, wire.ActionFrame{N: n + 1, Result: result})
			if err != nil {
				return err
			}
			if _, err := w.Write(line); err != nil {
				return err
			}
			flush()
			return nil
		}
		flush()
		if more == nil {
			continue
		}
		select {
		case <-more:
			alive.Reset(wire.ActionAlive)
		case <-alive.C:
			line, err := wire.AppendLine(nil, wire.ActionFrame{})
			if err != nil {
				return err
			}
			if _, err := w.Write(line); err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func firstOf(texts ...string) string {
	for _, t := range texts {
		if t != "" {
			return t
		}
	}
	return ""
}
