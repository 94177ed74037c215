/*
 * Each rank adds its number to a token that goes around, and all ranks sum their numbers up: nodes talk to each other.
 * Prints a line for each rank: number, node, sum, and the name of the system that it sees, which is the image's.
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void end(void)
{
#ifdef MPICH_VERSION
    /*
     * MPI_Finalize of Debian 12's MPICH (4.0.2 with UCX 1.13) hangs in every second run between nodes over TCP, also without any
     * container: a rank that has closed its connections does not answer the others any more (openucx/ucx issue 8738). So
     * this says "finished" to the launcher by itself, as MPI_Finalize does at its end.
     */
    const char *fd = getenv("PMI_FD");
    char answer[64];
    MPI_Barrier(MPI_COMM_WORLD);
    if (!fd || write(atoi(fd), "cmd=finalize\n", 13) != 13 || read(atoi(fd), answer, sizeof answer) <= 0)
        _exit(3);
    _exit(0);
#else
    MPI_Finalize();
#endif
}

int main(int argc, char **argv)
{
    int rank, size, token = 0, sum = 0;
    char host[64], system[128] = "", *name = system;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (rank > 0)
        MPI_Recv(&token, 1, MPI_INT, rank - 1, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    token += rank;
    MPI_Send(&token, 1, MPI_INT, (rank + 1) % size, 0, MPI_COMM_WORLD);
    if (rank == 0)
        MPI_Recv(&token, 1, MPI_INT, size - 1, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    MPI_Allreduce(&rank, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    if (rank == 0 && token != sum)
        MPI_Abort(MPI_COMM_WORLD, 2);
    gethostname(host, sizeof host);
    FILE *file = fopen("/etc/os-release", "r");
    if (file && fgets(system, sizeof system, file))
        name = system + strcspn(system, "\"");
    name[strcspn(name, "\n")] = 0;
    printf("%d of %d on %s: %d %s\n", rank, size, host, sum, name);
    fflush(stdout);
    end();
    return 0;
}
