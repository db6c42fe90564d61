//go:build !unix

package tunnel

// rawIO tells whether sockets can be read and written without waiting. Where
// they cannot, Batch is as on any other connection.
const rawIO = false

func (s *socket) tryRead(uintptr) bool  { return true }
func (s *socket) tryWrite(uintptr) bool { return true }

func (from *source) tryRead(uintptr) bool { return true }
