package simnode

import (
	"encoding/json"
	"io"
	"sync"

	"sallyport/internal/wire"
)

// Command is one line from the owner to a worker.
type Command struct {
	Rate   *float64 `json:"rate,omitempty"`   // events per second, all nodes together
	Spools bool     `json:"spools,omitempty"` // report the spools once
	Stop   bool     `json:"stop,omitempty"`
}

// Report is one line from a worker: figures, or what a command asked for.
type Report struct {
	Connected int64 `json:"connected"` // nodes whose signals are being read
	Sessions  int64 `json:"sessions"`  // end-to-end sessions that are open
	Enrolled  int64 `json:"enrolled"`  // certificates that came in this run
	Dialled   int64 `json:"dialled"`   // channels made
	Failures  int64 `json:"failures"`  // attempts that failed
	Hellos    int64 `json:"hellos"`    // sessions in which the gateway read a hello
	Stored    int64 `json:"stored"`    // events on disk here
	Acked     int64 `json:"acked"`     // events that the gateway has on disk
	Depth     int64 `json:"depth"`     // events that it has not
	Cuts      int64 `json:"cuts"`      // channels that chaos cut

	Problem  string       `json:"problem,omitempty"` // the last failed attempt since the report before
	Arrivals []Arrival    `json:"arrivals,omitempty"`
	Spools   []SpoolState `json:"spools,omitempty"`
}

// Arrival says when a node had a desired state on disk.
type Arrival struct {
	Policies []string `json:"policies"` // their digests
	At       int64    `json:"at"`       // unix nanoseconds
}

// SpoolState says how far the events of one node are.
type SpoolState struct {
	Node  wire.ID `json:"node"`
	Spool string  `json:"spool"`
	Last  int64   `json:"last"`  // highest on its disk
	Depth int64   `json:"depth"` // not acknowledged of those
}

// Sender sends reports; Receiver takes commands.
type Sender interface{ Send(Report) error }

// Receiver returns io.EOF when the owner is gone.
type Receiver interface{ Receive(*Command) error }

// Lines carries the talk as lines of JSON.
type Lines struct {
	in  *json.Decoder
	mu  sync.Mutex
	out *json.Encoder
}

// NewLines reads in and writes out.
func NewLines(in io.Reader, out io.Writer) *Lines {
	return &Lines{in: json.NewDecoder(in), out: json.NewEncoder(out)}
}

// Config reads the configuration, which stands before the commands: it holds
// the join code, a secret, so it is on no command line.
func (l *Lines) Config() (cfg Config, err error) {
	err = l.in.Decode(&cfg)
	return cfg, err
}

// Send writes a report.
func (l *Lines) Send(r Report) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.out.Encode(r)
}

// Receive reads a command.
func (l *Lines) Receive(c *Command) error { return l.in.Decode(c) }
