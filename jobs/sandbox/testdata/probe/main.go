//go:build wasip1

// Command probe is a guest that tries what a guest must not, and prints what
// it could see.
package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"time"
)

var sink []byte

func main() {
	switch os.Args[1] {
	case "look":
		look()
	case "exit":
		fmt.Fprintln(os.Stderr, "last words")
		code, _ := strconv.Atoi(os.Args[2])
		os.Exit(code)
	case "grow": // past any limit, by a Go program's own means
		for {
			sink = append(sink, make([]byte, 1<<20)...)
		}
	case "hold": // so many MiB of memory, all touched
		mib, _ := strconv.Atoi(os.Args[2])
		sink = make([]byte, mib<<20)
		for i := 0; i < len(sink); i += 4096 {
			sink[i] = 1
		}
		fmt.Println(len(sink))
	case "clock":
		fmt.Println(time.Now().UnixNano(), rand.Uint64())
		time.Sleep(time.Hour)
		fmt.Println(time.Now().UnixNano(), rand.Uint64())
		st, err := os.Stdin.Stat()
		fmt.Println(st.Mode(), st.ModTime().UnixNano(), err)
	case "random":
		fmt.Println(rand.Uint64())
	case "reads": // how the input arrives
		buf := make([]byte, 1<<20)
		for {
			n, err := os.Stdin.Read(buf)
			if err != nil {
				break
			}
			fmt.Print(n, " ")
		}
	case "args":
		fmt.Printf("%q", os.Args)
	case "echo":
		io.Copy(os.Stdout, os.Stdin)
	case "stderr":
		for i := range 1000 {
			fmt.Fprintf(os.Stderr, "line %d\n", i)
		}
	}
}

// look prints a line for every thing that is not refused.
func look() {
	report := func(what string, err error) {
		if err == nil {
			fmt.Println("could:", what)
		}
	}
	for _, path := range []string{"/etc/passwd", "etc/passwd", "../../../../etc/passwd", "/proc/self/environ", "/dev/stdin", "."} {
		_, err := os.ReadFile(path)
		report("read "+path, err)
	}
	for _, path := range []string{"/", ".", "/tmp", "/proc/self/fd"} {
		_, err := os.ReadDir(path)
		report("list "+path, err)
		_, err = os.Stat(path)
		report("stat "+path, err)
	}
	report("write", os.WriteFile("/tmp/deimos-escape", []byte("x"), 0o644))
	report("mkdir", os.Mkdir("/tmp/deimos-escape-dir", 0o755))
	for fd := 3; fd < 32; fd++ {
		f := os.NewFile(uintptr(fd), "fd")
		if f == nil {
			continue
		}
		_, err := f.Stat()
		report(fmt.Sprint("use descriptor ", fd), err)
	}
	_, err := net.Dial("tcp", "127.0.0.1:"+os.Args[2])
	report("dial", err)
	_, err = net.Listen("tcp", "127.0.0.1:0")
	if err == nil {
		// Go's wasip1 has a fake network inside the guest; only reaching the
		// host would be an escape.
		fmt.Println("fake listen")
	}
	if env := os.Environ(); len(env) > 0 {
		fmt.Println("could: see the environment", env)
	}
}
