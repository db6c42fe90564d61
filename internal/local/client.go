package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"

	"sallyport/internal/wire"
)

// patience is how long a role may take to answer: a disk may be slow.
const patience = 30 * time.Second

// maxAnswer bounds what the client reads: a node with thousands of policies.
const maxAnswer = 16 << 20

// Client speaks to one role's local socket.
type Client struct {
	socket   string
	http     *http.Client
	patience time.Duration
}

// NewClient does no I/O: the first call finds out whether the role runs.
func NewClient(socket string) *Client {
	return &Client{socket: socket, patience: patience, http: &http.Client{
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				addr, done, err := socketAddr(socket)
				if err != nil {
					return nil, err
				}
				defer done()
				var d net.Dialer
				return d.DialContext(ctx, "unix", addr.Name)
			},
		},
	}}
}

// Status of the role.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	return s, c.do(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Instances of a node; empty for other roles.
func (c *Client) Instances(ctx context.Context) ([]Instance, error) {
	var s []Instance
	return s, c.do(ctx, http.MethodGet, "/v1/instances", nil, &s)
}

// Doctor returns the role's findings about itself.
func (c *Client) Doctor(ctx context.Context) ([]Check, error) {
	var s []Check
	return s, c.do(ctx, http.MethodGet, "/v1/doctor", nil, &s)
}

// SendEvent returns when the event is on disk.
func (c *Client) SendEvent(ctx context.Context, e EventRequest) (EventReceipt, error) {
	var r EventReceipt
	return r, c.do(ctx, http.MethodPost, "/v1/events", e, &r)
}

// Unlock makes an instance, named by its trust domain, obey its gateway again.
// An empty name means the only one that is locked.
func (c *Client) Unlock(ctx context.Context, instance string) error {
	return c.do(ctx, http.MethodPost, "/v1/unlock", unlockRequest{instance}, nil)
}

// Join hands over the text of a join code.
func (c *Client) Join(ctx context.Context, code string) error {
	return c.do(ctx, http.MethodPost, "/v1/join", joinRequest{code}, nil)
}

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.patience, fmt.Errorf("%w within %s: is its process stopped, or its disk?", ErrMute, c.patience))
	defer cancel()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://local"+path, body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%s: %w: start it, or set SALLYPORT_DATA to its directory", c.socket, ErrNotRunning)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w: this user may not pass through its directory; run as the user that owns it, or as root", c.socket, fs.ErrPermission)
	case err != nil:
		if ue := (*url.Error)(nil); errors.As(err, &ue) {
			err = ue.Err // the URL is made up, and says nothing to the reader
		}
		return fmt.Errorf("%s: %w", c.socket, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		var e Error
		if err := wire.DecodeJSON(resp.Body, maxBody, &e); err != nil || e.Code == "" {
			return fmt.Errorf("%s: %s %s: %s", c.socket, method, path, resp.Status)
		}
		return &e
	}
	if out == nil {
		return nil
	}
	return wire.DecodeJSON(resp.Body, maxAnswer, out)
}
