package agent

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockPatience is longer than anybody needs who only asks, see locked.
const lockPatience = time.Second

// flock takes an exclusive lock. It ends with the process, however that ends.
func flock(f *os.File) error {
	for began := time.Now(); ; time.Sleep(lockPatience / 20) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || time.Since(began) > lockPatience {
			return err
		}
	}
}

// locked tells whether somebody has the lock of a file. To know, it takes it for
// a moment, shared with others who only ask.
func locked(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil
}
