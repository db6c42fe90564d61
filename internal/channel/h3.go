package channel

import "context"

type udpPort struct{}

func openUDP(string, *Listener) (*udpPort, error)                    { return nil, ErrNoTransport }
func (u *udpPort) close()                                            {}
func (u *udpPort) accept(ctx context.Context, run func(*Conn)) error { return nil }
