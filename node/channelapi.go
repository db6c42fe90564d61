package node

import (
	"net/http"

	"golang.org/x/time/rate"

	"sallyport/internal/channel"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

// maxSessions is how many CONNECT streams one channel may hold open: each
// gateway needs one.
const maxSessions = 64

// maxSignals is how many streams of signals one channel may hold open: one is
// read, and an RCP that follows them anew may not have ended the last one yet.
const maxSignals = 4

// maxStreams is how many requests an upstream peer may have open on one channel:
// beside sessions and signals there are only short ones. Each holds a window of
// our memory for what is sent with it, on a host that is not ours.
const maxStreams = 2 * maxSessions

// channelHandler is everything that an upstream peer can ask of a node on a
// channel. While either side enrols, that is our own key and nothing else.
func (in *instance) channelHandler(c *channel.Conn) http.Handler {
	generation := in.generation.Add(1)
	slots, signals := make(chan struct{}, maxSessions), make(chan struct{}, maxSignals)
	pace := rate.NewLimiter(laneRate, laneBurst)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodConnect:
			select {
			case slots <- struct{}{}:
				defer func() { <-slots }()
				in.connect(w, r, c)
			default:
				channel.Refuse(w, http.StatusServiceUnavailable, "too many sessions on this channel")
			}
		case c.Enrolling():
			channel.Refuse(w, http.StatusNotFound, "this channel is for enrolment")
		case r.Method == http.MethodGet && r.URL.Path == wire.PathSignals:
			select {
			case signals <- struct{}{}:
				defer func() { <-signals }()
				in.serveSignals(w, r, c, generation)
			default:
				channel.Refuse(w, http.StatusTooManyRequests, "too many streams of signals on this channel")
			}
		case r.Method == http.MethodPost && r.URL.Path == wire.PathDrain:
			in.takeDrain(w, r)
		case r.Method == http.MethodPost && r.URL.Path == wire.PathLanes:
			in.takeLane(w, r, c, pace)
		default:
			channel.Refuse(w, http.StatusNotFound, "a node answers no such request")
		}
	})
}

// connect serves a session or a tunnel: the stream's other end must prove, inside it, that
// it is a gateway.
func (in *instance) connect(w http.ResponseWriter, r *http.Request, c *channel.Conn) {
	id, key, err := wire.ParseAuthority(r.Host)
	switch {
	case err != nil:
		channel.Refuse(w, http.StatusBadRequest, err.Error())
		return
	case key != "" && (!c.Enrolling() || key != in.id.KeyHash()), key == "" && (c.Enrolling() || id != in.id.ID()):
		channel.Refuse(w, http.StatusNotFound, "this is another node")
		return
	}
	stream, err := channel.AcceptConnect(w, r)
	if err != nil {
		in.log.Debug("session not accepted", "error", err)
		return
	}
	defer func() { _ = stream.Close() }()
	if key != "" {
		err = session.ServeEnroll(r.Context(), stream, in.id, in.applicant.Handler(in.sessionAPI))
	} else {
		err = session.Handlers{API: in.sessionAPI, Targets: in.serveTarget}.Serve(r.Context(), stream, in.id)
	}
	in.log.Debug("session ended", "reason", err)
}

// takeDrain: the upstream is about to end this channel; the channel itself
// sees to its replacement.
func (in *instance) takeDrain(w http.ResponseWriter, r *http.Request) {
	var d wire.Drain
	if err := wire.DecodeJSON(r.Body, wire.MaxEnrollBody, &d); err != nil {
		channel.Refuse(w, http.StatusBadRequest, "drain: "+err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}
